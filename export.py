"""Writes trained SAEs in other formats: `python export.py --help`."""

from src.config import run_stage


def export(cfg):
    from src import checkpoint, export_formats

    refused = []
    for sae, recipe in checkpoint.open_saes(cfg):
        if "norm_eps" in cfg.typed:
            sae.norm_eps = recipe["config"]["norm_eps"] = cfg.norm_eps
        try:
            folder = export_formats.export(
                sae, recipe, cfg.output_dir, cfg.format, cfg.overwrite, cfg.license
            )
            print(f"saved {folder}")
        except ValueError as error:
            refused.append(f"{recipe['title']} is not exported: {error}")
    if refused:
        raise ValueError("; ".join(refused))


if __name__ == "__main__":
    raise SystemExit(run_stage("export", export))
