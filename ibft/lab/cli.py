"""`ibft lab`: small experiments on data and models made on the spot."""

from collections.abc import Sequence

from ibft.errors import InputError
from ibft.flags import read_flags

_USAGE = """usage: ibft lab EXPERIMENT [options]

experiments:
  demo   fine-tune a tiny Llama with and without the bottleneck, and compare (ibft lab demo --help)"""


def main(argv: Sequence[str]) -> None:
    """Runs an experiment. Raises InputError for one that there is not."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if argv[0] != "demo":
        raise InputError(f"{argv[0]!r} is not an experiment of `ibft lab`; there is: demo.")
    from ibft.lab.demo import DemoConfig, run_demo

    flags = read_flags(DemoConfig, argv[1:], "ibft lab demo", "IB-FT from end to end in a few minutes, on a laptop.")
    run_demo(DemoConfig(**flags))
