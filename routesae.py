"""One command for every stage: `routesae train --help` is `python train.py --help`.

In the installed package this file is the package `routesae`: the modules of the program lie beside
it, where no other package sees them. `from routesae import Reader` gives the interface in Python.
"""

import importlib
import runpy
import sys
from pathlib import Path

HOME = str(Path(__file__).resolve().parent)
SMALL_PROGRAMS = {
    "page": "Write the HTML page of an SAE's features.",
    "plots": "Draw evaluations, or the course of a training.",
    "sources": "Write a source of text as three disjoint splits.",
    "hub": "Fetch a language model from the hub.",
}


def _find_modules():
    """Let this process import the program's modules, whose package is called src.

    Raises ImportError if the process has another package of this name.
    """
    if HOME not in sys.path:
        sys.path.insert(0, HOME)
    import src

    if str(Path(src.__file__).resolve().parent.parent) != HOME:
        raise ImportError(
            f"this process has another package called src ({src.__file__}); "
            "use routesae in a process of its own"
        )


def __getattr__(name):
    if name != "Reader":
        raise AttributeError(f"routesae has no {name!r}; it has Reader")
    _find_modules()
    return importlib.import_module("src.reader").Reader


def _usage(about):
    lines = ["usage: routesae COMMAND [options]", "", "stages:"]
    lines += [f"  {stage:<10} {text.split('. ')[0].rstrip('.')}." for stage, text in about.items()]
    lines += ["", "small programs:"]
    lines += [f"  {name:<10} {text}" for name, text in SMALL_PROGRAMS.items()]
    return "\n".join([*lines, "", "routesae COMMAND --help tells more."])


def main():
    _find_modules()
    from src import config, stage_help

    sys.argv[0] = "routesae"  # messages name the program that was called
    name, *words = sys.argv[1:] or ["--help"]
    if name in config.STAGES:
        stage = getattr(importlib.import_module(name), name)
        return config.run_stage(name, stage, words)
    if name in SMALL_PROGRAMS:
        sys.argv[1:] = words
        runpy.run_module(f"src.{name}", run_name="__main__", alter_sys=False)
        return 0
    if name in ("-h", "--help"):
        print(_usage(config.ABOUT))
        return 0
    near = stage_help.did_you_mean(name, [*config.STAGES, *SMALL_PROGRAMS])
    print(
        f"routesae: error: there is no command {name}{near}; see routesae --help", file=sys.stderr
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
