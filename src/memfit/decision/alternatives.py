"""The options of the decision: doing nothing, the machines of the user's case, and the catalog's machines.

An `Alternative` is a machine that is owned, bought or rented, with plain training or a memory-saving plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from memfit import catalog
from memfit.catalog import prices
from memfit.decision.case import Cloud, DecisionCase, Existing, ExistingMachine, Purchase
from memfit.techniques.registry import TECHNIQUES
from memfit.types.decision import Alternative, Amount
from memfit.types.errors import UserError, suggest
from memfit.types.machine import Fact
from memfit.types.machine import Machine as CatalogMachine
from memfit.types.plan import EffectClass, Plan
from memfit.types.result import Offer

_DESKTOP: Final = "workstation"
_ANY_NUMBER: Final = (_DESKTOP, "PCIe")  # hosts sold with any number of devices
PLAIN: Final = "plain training"
_SURE: Final = 100.0  # percent: the upper end of the memory fits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AlternativeInputs:
    """The inputs from which the options of the decision are built.

    ``case``: the user's figures. ``offers``: predictions for machines, each for plain training or a
    recommended plan. ``steps_per_run``: optimizer steps of one run. ``plan_hours``: people's working hours
    for adopting the recommended plan, from the case or counted in the proof of concept; None if unknown.
    ``labour_known``: whether the case has the price of a working hour. ``trained``: the plan whose results
    the proof of concept judged.
    """

    case: DecisionCase
    offers: Sequence[Offer]
    steps_per_run: int
    plan_hours: float | None
    labour_known: bool
    trained: Plan = dataclasses.field(default_factory=Plan)

    def build_options(self) -> tuple[Alternative, ...]:
        """Return the options of the decision, in this order: doing nothing; the machines that the case names;
        and the catalog's machines, bought and rented, that have a price, a predicted step time and a
        prediction that fits (see `_makes_options`).

        A machine that the case names gives up to two options, with plain training and with the recommended
        plan. Raises UserError if the case names a machine without known hours or price, or gives figures of a
        machine but does not name it.
        """
        case = self.case
        user_ways: list[Alternative] = []
        for kind in ("existing", "purchase", "cloud"):
            section: ExistingMachine = getattr(case, kind)
            if section.machine is not None:
                user_ways += self._of_user(kind, section)
            elif section != type(section)():
                self._refuse_figures_without_machine(kind, section)
        catalog_ways = [
            way for offer in self.offers if _makes_options(offer) for way in self._of_catalog(offer)
        ]
        return (Alternative(kind="nothing"), *user_ways, *catalog_ways)

    def _refuse_figures_without_machine(self, kind: str, section: ExistingMachine) -> None:
        """Raise UserError if the section ``kind`` of the case, which names no machine, sets figures of one.

        Setup hours, operating hours, the price of storage and the site may be set without a machine.
        """
        optional_keys = {"setup_hours", "operating_hours_per_year", "storage_per_month", "site"}
        keys = sorted(section.model_fields_set - optional_keys)
        if keys:
            raise UserError(
                f"section [{kind}] of the case sets {', '.join(keys)} but names no machine",
                hint="add to the section the machine that these keys describe, such as "
                'machine = "8xH100-SXM", or remove the keys',
            )

    def _of_user(self, kind: str, section: ExistingMachine) -> list[Alternative]:
        machine = _catalog_machine(section.machine or "")
        name = machine.name if machine is not None else section.machine or ""
        hours_by_plain = {True: section.hours_plain, False: section.hours_recommended}
        candidates = []
        for plain, hours in hours_by_plain.items():
            offer, at_once = self._offer_for(name, machine, plain)
            if hours is None and (offer is None or not offer.fits or offer.step_s is None):
                continue
            way = self._option(kind, section, name, plain, hours, offer, machine)
            candidates.append(dataclasses.replace(way, parallel_count=at_once if hours is None else 1))
        if not candidates and machine is None:
            raise UserError(
                f"section [{kind}] of the case names the machine {name!r}, which the catalog does not have "
                f"({_why_not_in_catalog(name)}), and sets neither hours_plain nor hours_recommended",
                hint=f"{_did_you_mean_or(name)}set for your own machine hours_plain or hours_recommended, "
                "the hours of one run with the plain or recommended plan; power_w, its watts under load; and "
                "in [purchase] its price, in [cloud] its rent per_hour",
            )
        if not candidates:
            raise UserError(
                f"for the machine {name!r} in section [{kind}] of the case, the proof of concept has no "
                "predicted step time of a plan, plain or recommended, that fits the machine's memory",
                hint=f"`memfit decide --pilot {name}` predicts it if all gates hold; or set hours_plain or "
                "hours_recommended, the hours of one run with the plain or recommended plan, in that section",
            )
        return candidates

    def _offer_for(self, name: str, machine: CatalogMachine | None, plain: bool) -> tuple[Offer | None, int]:
        """Return (the prediction for the machine, 1). If there is none, but one for a single device of it:
        (that prediction with the watts of all devices, number of devices). Each device then trains a run of
        its own, so that nothing is assumed about their communication. (None, 1) if there is neither.
        """
        offers = {o.machine: o for o in self.offers if o.plain is plain}
        if name in offers or machine is None or machine.device_count == 1:
            return offers.get(name), 1
        single = offers.get(machine.device.name)
        if single is None:
            return None, 1
        power_w = None if single.power_w is None else single.power_w * machine.device_count
        return dataclasses.replace(single, power_w=power_w), machine.device_count

    def _option(
        self,
        kind: str,
        section: ExistingMachine,
        name: str,
        plain: bool,
        hours: float | None,
        offer: Offer | None,
        machine: CatalogMachine | None,
    ) -> Alternative:
        power_w = section.power_w if section.power_w else offer.power_w if offer else _power_w(machine)
        way = self._without_costs(kind, name, plain, offer)
        price: Amount | None = None
        per_hour: Amount | None = None
        catalog_price: Fact | None = None
        if isinstance(section, Purchase):
            catalog_price = None if section.price else machine_price(machine)
            price = Amount(own=section.price.value) if section.price else _amount(catalog_price)
            if price is None:
                raise UserError(
                    f"the catalog has no price to buy the machine {name} in section [purchase] of the case: "
                    "that of its devices or of their server is unknown, or they are sold only in whole "
                    "servers, which their number does not fill",
                    hint="add price = ..., the price of one machine with all its devices, without tax, in "
                    "the currency of the case",
                )
        if isinstance(section, Cloud):
            catalog_price = None if section.per_hour else machine_rent(machine)
            per_hour = Amount(own=section.per_hour.value) if section.per_hour else _amount(catalog_price)
            if per_hour is None:
                raise UserError(
                    f"the catalog has no on-demand price for the machine {name} in section [cloud] of the "
                    "case",
                    hint="add per_hour = ..., the rent for an hour of one machine with all its devices, "
                    "without tax, in the currency of the case",
                )
        return dataclasses.replace(
            _with_memory(way, offer if hours is None else None),
            hours=hours if hours is not None else self._hours(offer),
            predicted=hours is None,
            power_w=power_w,
            own_power=bool(section.power_w),
            price=price,
            per_hour=per_hour,
            most_machines=section.machines if isinstance(section, Existing) else None,
            embodied_kg=_embodied_kg(machine),
            plain_j=self._plain_j(name),
            of_catalog=False,
            unknown=way.unknown if power_w or kind == "cloud" else (*way.unknown, f"{kind}.power_w"),
            site=self._site(kind, machine),
            **_price_fields(machine, catalog_price),
        )

    def _of_catalog(self, offer: Offer) -> Iterator[Alternative]:
        machine = _catalog_machine(offer.machine)
        if machine is None:
            return
        facts = {"purchase": machine_price(machine), "cloud": machine_rent(machine)}
        for kind, fact in facts.items():
            amount = _amount(fact)
            if amount is None or offer.step_s is None:
                continue
            yield dataclasses.replace(
                _with_memory(self._without_costs(kind, offer.machine, offer.plain, offer), offer),
                hours=self._hours(offer),
                power_w=offer.power_w,
                price=amount if kind == "purchase" else None,
                per_hour=amount if kind == "cloud" else None,
                embodied_kg=_embodied_kg(machine),
                plain_j=self._plain_j(offer.machine),
                site=self._site(kind, machine),
                **_price_fields(machine, fact),
            )

    def _site(self, kind: str, machine: CatalogMachine | None) -> str:
        """Return where a machine stands, for its PUE: "cloud" if it is rented; "desk"; or "" for a server
        room.

        An owned machine stands where ``site`` in its section of the case says. Without ``site``, a machine
        whose host in the catalog is a workstation stands at a desk, and any other in a server room. If the
        case has a PUE, that counts for every owned machine, and the result is "".
        """
        if kind == "cloud":
            return "cloud"
        if self.case.money.pue_ratio is not None:
            return ""
        section = self.case.existing if kind == "existing" else self.case.purchase
        host_name = catalog.host_of(machine.device.name) if machine is not None else ""
        site = section.site or ("desk" if host_name == _DESKTOP else "server-room")
        return "desk" if site == "desk" else ""

    def _without_costs(self, kind: str, name: str, plain: bool, offer: Offer | None) -> Alternative:
        """Return an option of this kind on the machine ``name``, with its plan's label, people's working
        hours and the price of storage. The hours of a run, power and the machine's price are not set.

        Its ``unknown`` names the working hours that were not given, and money.labour_per_hour if that is not
        given and any working hours are unknown or not zero.
        """
        section: ExistingMachine = getattr(self.case, kind)
        hours = {
            f"{kind}.setup_hours": section.setup_hours,
            f"{kind}.operating_hours_per_year": section.operating_hours_per_year,
        }
        if not plain:
            hours["effort.setup_hours"] = self.plan_hours
        unknown = [n for n, h in hours.items() if h is None]
        if not self.labour_known and any(h != 0 for h in hours.values()):
            unknown.append("money.labour_per_hour")
        label = PLAIN if plain else offer.plan if offer is not None else self.trained.label
        setup, operating = hours[f"{kind}.setup_hours"], hours[f"{kind}.operating_hours_per_year"]
        return Alternative(
            kind=kind,
            machine=name,
            plan=label,
            untried=() if plain else self._untried_techniques(label),
            plain=plain,
            setup_hours=(setup or 0.0) + (hours.get("effort.setup_hours") or 0.0),
            plan_hours=hours.get("effort.setup_hours") or 0.0,
            operating_hours=operating or 0.0,
            storage_per_month=self.case.cloud.storage_per_month or 0.0 if kind == "cloud" else 0.0,
            unknown=tuple(unknown),
        )

    def _plain_j(self, machine: str) -> float | None:
        offer = next((o for o in self.offers if o.machine == machine and o.plain), None)
        if offer is None or not offer.fits or offer.step_s is None or offer.power_w is None:
            return None  # if plain training cannot run there, nothing is saved
        return self.steps_per_run * offer.step_s.value * offer.power_w

    def _untried_techniques(self, label: str) -> tuple[str, ...]:
        """Return the techniques of the plan with this label that change results by more than reordered sums
        and that the plan of the proof of concept did not have.
        """
        names = [part.partition("(")[0] for part in label.split(" + ")]
        trained_techniques = self.trained.techniques
        techniques = [TECHNIQUES[n] for n in names if n in TECHNIQUES and n not in trained_techniques]
        return tuple(t.name for t in techniques if t.effect > EffectClass.E1)

    def _hours(self, offer: Offer | None) -> float:
        assert offer is not None and offer.step_s is not None, (
            "called only with an offer that has a step time"
        )
        return self.steps_per_run * offer.step_s.value / 3600


def _makes_options(offer: Offer) -> bool:
    """Return whether options with the catalog's prices are made from a prediction.

    The plan must fit as predicted. For a recommended plan, the upper end of the predicted memory must fit the
    device, too. For plain training, with which it is compared, this is not required, so that uncertainty
    never makes the saving look larger than it is.
    """
    return offer.fits and (offer.plain or _fit_percent(offer) >= _SURE)


def _with_memory(way: Alternative, offer: Offer | None) -> Alternative:
    """Return the option with the predicted memory, the device's memory and the probability that it fits, from
    ``offer``.

    If ``offer`` is None, because the user gave the hours of a run, the option is returned as it is; its
    probability to fit is then 100 %.
    """
    if offer is None:
        return way
    return dataclasses.replace(
        way,
        memory_bytes=offer.memory_bytes,
        usable_bytes=usable_bytes(offer.machine),
        fit_percent=_fit_percent(offer),
    )


def usable_bytes(machine: str) -> float | None:
    """Return the memory of one device of the machine in bytes; None if ``machine`` is not a name that
    `catalog.machine` reads.
    """
    catalog_machine = _catalog_machine(machine)
    return catalog_machine.device.memory_bytes.value if catalog_machine is not None else None


def _fit_percent(offer: Offer) -> float:
    """Return the probability in percent that the device has enough memory. The need is taken to be
    distributed triangularly over the interval of the prediction, with its peak at the value. Return 100 if
    the device's memory is unknown or not below the upper end, and 0 if it is not above the lower end.
    """
    prediction, available_bytes = offer.memory_bytes, usable_bytes(offer.machine)
    if available_bytes is None or available_bytes >= prediction.high:
        return 100.0
    if available_bytes <= prediction.low:
        return 0.0
    width = prediction.high - prediction.low
    if available_bytes >= prediction.value:
        return 100 * (
            1 - (prediction.high - available_bytes) ** 2 / (width * (prediction.high - prediction.value))
        )
    return 100 * (available_bytes - prediction.low) ** 2 / (width * (prediction.value - prediction.low))


def _did_you_mean_or(name: str) -> str:
    hint = suggest(name, catalog.device_names())
    return f"{hint} or " if hint else ""


def _why_not_in_catalog(name: str) -> str:
    """Return why the catalog has no machine ``name``: an unknown device or network, or a wrong form; "" if it
    has the machine."""
    try:
        catalog.machine(name)
    except UserError as error:
        return error.given
    return ""


def _catalog_machine(name: str) -> CatalogMachine | None:
    """Return the machine that `catalog.machine` reads from the name, or None if that raises UserError."""
    try:
        return catalog.machine(name)
    except UserError:
        return None


def machine_price(machine: CatalogMachine | None) -> Fact | None:
    """Return the catalog's purchase price of the machine in US dollars, with its range: its devices and the
    servers around them.

    The errors of both are taken as independent. Return None without a machine, if a price is unknown, or if
    the devices are sold only in whole servers and their number does not fill whole servers.
    """
    if machine is None:
        return None
    device, host_name = machine.device, catalog.host_of(machine.device.name)
    server = prices.server_usd(host_name) if host_name else None
    if device.usd_to_buy is None or server is None:
        return None
    devices_in_host = catalog.devices_of(host_name)
    if not host_name.startswith(_ANY_NUMBER) and machine.device_count % devices_in_host:
        return None
    devices_per_host = machine.devices_per_host or min(machine.device_count, devices_in_host)
    servers = -(-machine.device_count // devices_per_host)
    parts = ((device.usd_to_buy, machine.device_count), (server, servers))
    value = sum(fact.value * count for fact, count in parts)
    below = math.hypot(*(count * (fact.value - fact.bounds[0]) for fact, count in parts))
    above = math.hypot(*(count * (fact.bounds[1] - fact.value) for fact, count in parts))
    return dataclasses.replace(device.usd_to_buy, value=value, low=value - below, high=value + above)


def machine_rent(machine: CatalogMachine | None) -> Fact | None:
    """Return the catalog's rental price per hour of the machine with all its devices, with its range. Return
    None without a machine or if the price is unknown.
    """
    hourly = machine.device.usd_per_hour if machine is not None else None
    if machine is None or hourly is None:
        return None
    low, high = (bound * machine.device_count for bound in hourly.bounds)
    return dataclasses.replace(hourly, value=hourly.value * machine.device_count, low=low, high=high)


def _amount(fact: Fact | None) -> Amount | None:
    return None if fact is None else Amount(usd=fact.value)


def _price_fields(machine: CatalogMachine | None, fact: Fact | None) -> dict[str, Any]:
    """Return the fields of an option that name the device whose price of the catalog it has, and give the
    spread between sellers. Empty if ``machine`` or ``fact`` is None, as for a price of the user's, or if the
    price is 0.
    """
    if machine is None or fact is None or not fact.value:
        return {}
    return {
        "priced_device": machine.device.name,
        "device_count": machine.device_count,
        "price_low_ratio": fact.bounds[0] / fact.value,
        "price_high_ratio": fact.bounds[1] / fact.value,
    }


def _power_w(machine: CatalogMachine | None) -> float | None:
    """Return the watts of the machine's devices and hosts at full load, which are an upper bound where no
    prediction exists.

    Return None without a machine or if the devices' watts are unknown. Hosts of unknown watts count as zero.
    """
    from memfit.cost.money import hosts_w

    if machine is None or machine.device.power_w is None:
        return None
    return machine.device.power_w.value * machine.device_count + (hosts_w(machine) or 0.0)


def _embodied_kg(machine: CatalogMachine | None) -> float | None:
    if machine is None or machine.device.embodied_kg is None:
        return None
    return machine.device.embodied_kg.value * machine.device_count


def missing_inputs(ways: Iterable[Alternative], case: DecisionCase) -> tuple[str, ...]:
    """Return the names of the case's unset keys that a complete decision between ``ways`` needs, most
    important first: "existing.machine", then what the options name as unknown, then "work.value_per_run".
    """
    unknown_keys = dict.fromkeys(name for way in ways for name in way.unknown)
    missing = [] if case.existing.machine else ["existing.machine"]
    value = [] if case.work.value_per_run is not None else ["work.value_per_run"]
    return (*missing, *unknown_keys, *value)
