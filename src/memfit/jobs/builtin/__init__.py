"""The built-in jobs with their models and data.

A job is a module with ``NAME`` and ``make``; `memfit.jobs.registry` lists them. The others are what jobs are
made of: models (``alphafold``, ``esm``, ``gpt``, ``hyena``, ``molformer``, ``neural_operator``, ``schnet``,
``unet3d``), readers (``chains``, ``fasta``, ``smiles``), the solver that computed the data of ``weather``
(``navier_stokes``), and what several jobs do (``batches``, ``next_token``, ``options``).
"""
