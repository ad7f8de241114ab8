"""A page on which to type a text and steer it: `python explore.py --help`."""

from src.config import run_stage


def explore(cfg):
    try:
        from src.server import listening, serve
    except ModuleNotFoundError as error:
        needed = "pip install -r requirements-explore.txt"
        raise ValueError(f"explore.py needs the package {error.name}; {needed}") from None
    from src.explorer import Explorer

    listener = listening(cfg.port)  # a port that is taken is an error before the models load
    serve(Explorer(cfg), listener)


if __name__ == "__main__":
    raise SystemExit(run_stage("explore", explore))
