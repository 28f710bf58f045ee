"""Console scripts ``lightning`` and ``mmgen``, and ``python -m lightning_mmgen``. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys

HELP = """usage: lightning <fit|validate|test|predict> -c EXPERIMENT.yaml [-c OVERLAY.yaml ...] [--key value ...]

  fit        train                          lightning fit -c experiments/instruct.yaml
  validate   loss on the held-out records
  test       the same, under its own name
  predict    pictures for the held-out records

  -c FILE               an experiment, then overlays; later ones win
  --print_config        the resolved configuration
  --ckpt_path last      go on where the last run of the experiment stopped
  lightning fit --help  every option

A YAML may import lightning_mmgen, lightning, torch and the modules of the working directory; MMGEN_ALLOW=name,name allows more.
"""


def lightning() -> int:
    """The ``lightning`` command."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    from .cli import command

    return command()


def mmgen() -> int:
    """The ``mmgen`` command; ``mmgen fit`` and its kin are ``lightning fit`` under a name that no other package owns."""
    if sys.argv[1:2] and sys.argv[1] in ("fit", "validate", "test", "predict"):
        return lightning()
    from .tools.main import main

    return main(sys.argv[1:])


def other_owners() -> list[str]:
    """Installed packages beside this one that bring a ``lightning`` command."""
    from importlib.metadata import distributions

    owners = {d.metadata["Name"] for d in distributions() for e in d.entry_points if e.group == "console_scripts" and e.name == "lightning"}
    return sorted(owners - {"lightning_mmgen", "lightning-mmgen"})


if __name__ == "__main__":
    if owners := other_owners():
        print(
            f"note: {', '.join(owners)} brings a `lightning` command too; `mmgen` and `python -m lightning_mmgen` are always ours",
            file=sys.stderr,
        )
    sys.exit(lightning())
