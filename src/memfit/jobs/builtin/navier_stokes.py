"""The barotropic vorticity equation of the first numerical weather forecasts (Charney, Fjortoft and von
Neumann 1950): two-dimensional Navier-Stokes on a doubly periodic beta plane.

``dw/dt + u . grad w + beta v = nu laplacian w`` with ``u = (d psi/dy, -d psi/dx)``, ``laplacian psi = -w``,
on [0, 2 pi)^2. The axes are (y, x). The solver is pseudo-spectral: products are formed on the grid and
dealiased by the two-thirds rule (Orszag 1971). Time steps are fourth-order Runge-Kutta on ``exp(-L t) w``, so
that the linear part L, viscosity and Rossby waves, is exact. It runs in double precision.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """The barotropic vorticity equation on a doubly periodic square with sides of 2 pi, on a grid of
    ``points`` x ``points``. ``viscosity`` and ``beta``: nu and beta of the equation. Fields on the grid have
    the shape (points, points) with axes (y, x); spectra, their real Fourier transforms, (points, points // 2
    + 1)."""

    points: int
    viscosity: float
    beta: float = 0.0  # gradient of planetary vorticity along y

    def wavenumbers(self) -> tuple[Array, Array]:
        """Return the integer wavenumbers along y, (points, 1), in FFT order (from 0 up, then the negative
        ones), and along x, (1, points // 2 + 1), from 0 up."""
        frequencies = np.fft.fftfreq(self.points, 1 / self.points)
        return frequencies[:, None], np.arange(self.points // 2 + 1)[None, :]

    def linear(self) -> Array:
        """Return the complex rate of each wavenumber in 1/s, (points, points // 2 + 1): viscous decay as the
        real part, zero or negative, and the westward propagation of Rossby waves as the imaginary part."""
        y, x = self.wavenumbers()
        square = y**2 + x**2
        return np.asarray(-self.viscosity * square + 1j * self.beta * x / np.maximum(square, 1))

    def velocity(self, spectrum: Array) -> tuple[Array, Array]:
        """Return the velocities (u along x, v along y) on the grid. ``spectrum``: that of the vorticity."""
        y, x = self.wavenumbers()
        psi = spectrum / np.maximum(y**2 + x**2, 1)
        return self.grid(1j * y * psi), self.grid(-1j * x * psi)

    def advection(self, spectrum: Array) -> Array:
        """Return the spectrum of ``-u . grad w``, which is zero from a third of ``points`` on along either
        axis (two-thirds rule against aliasing). ``spectrum``: that of the vorticity w."""
        y, x = self.wavenumbers()
        u, v = self.velocity(spectrum)
        product = u * self.grid(1j * x * spectrum) + v * self.grid(1j * y * spectrum)
        dealias_mask = (np.abs(y) < self.points / 3) & (x < self.points / 3)
        return -np.fft.rfft2(product) * dealias_mask

    def grid(self, spectrum: Array) -> Array:
        return np.fft.irfft2(spectrum, s=(self.points, self.points))


def advance(square: Square, vorticity: Array, *, step_s: float, steps: int) -> Array:
    """Return ``vorticity`` (..., points, points) after ``steps`` fourth-order Runge-Kutta steps of the
    equation ``square``, of ``step_s`` seconds each."""
    half = np.exp(square.linear() * step_s / 2)
    w = np.fft.rfft2(vorticity)
    for _ in range(steps):
        a = step_s * square.advection(w)
        b = step_s * square.advection(half * (w + a / 2))
        c = step_s * square.advection(half * w + b / 2)
        d = step_s * square.advection(half * (half * w + c))
        w = half * (half * (w + a / 6) + (b + c) / 3) + d / 6
    return square.grid(w)


def random_vorticity(rng: np.random.Generator, count: int, points: int, *, peak: float) -> Array:
    """Return ``count`` random fields, (count, points, points), Gaussian, each with zero mean and unit
    variance.

    The amplitude of their Fourier modes is highest at wavenumber ``peak``.
    """
    wave = np.hypot(*Square(points=points, viscosity=0).wavenumbers())
    amplitude = wave**2 * np.exp(-((wave / peak) ** 2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((count, points, points))) * amplitude)
    return np.asarray(field / field.std(axis=(1, 2), keepdims=True))


def coarsen(vorticity: Array, points: int) -> Array:
    """Return the fields ``vorticity`` (..., n, n) on a coarser grid of ``points`` x ``points``, an even
    number up to n, without the wavenumbers from ``points`` / 2 on, which this grid does not resolve."""
    fine_points, half = vorticity.shape[-1], points // 2
    spectrum = np.fft.rfft2(vorticity)[..., : half + 1]
    spectrum = np.concatenate([spectrum[..., :half, :], spectrum[..., -half:, :]], axis=-2)
    spectrum[..., half, :] = spectrum[..., half] = 0
    return np.asarray(np.fft.irfft2(spectrum, s=(points, points)) * (points / fine_points) ** 2)
