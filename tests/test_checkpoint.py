"""Weights and recipes on disk: which pairs load, which files are refused, and what is replaced."""

import errno
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import time
import zipfile

import pytest
import torch
from test_formats import export, random_sae, recipe_of, saelens_folder
from test_security import train, write_text

from src import checkpoint, export_formats, files, formats, tensor_files
from src.config import parse
from src.model import build
from src.ops import squared_errors
from src.sae import BatchInfo
from src.trainer import Trainer


class Killed(BaseException):
    """Stands for SIGKILL."""


def save(folder, k=5, seed=0):
    """Path of a TopK, random by seed."""
    sae = random_sae("TopK", k=k)
    with torch.no_grad():
        sae.encoder.weight.mul_(1 + seed)
    return checkpoint.save(sae, recipe_of(sae), folder, "TopK_text")


def sum_and_k(path):
    sae, recipe = checkpoint.load(path)
    return recipe["weights_sum"], sae.k


def change(path, **config):
    recipe = json.loads(path.with_suffix(".json").read_text())
    recipe["config"] |= config
    path.with_suffix(".json").write_text(json.dumps(recipe))


# --------------------------------------------------------------------------- earlier versions

# What two earlier versions, 42423f2 and cf90fbb, made of checkpoints that they wrote: the values
# of their recipes, then NormMSE, sum of the latents, and sum of the patched states.
SIZES = {"latent_size": 24, "k": 3, "hidden_size": 8, "n_layers": 4}
ONE_SITE = SIZES | {"layer": 3}
ROUTER = {"router_objective": "expected", "router_balance": "switch", "seed": 5}
PUBLISHED_ROUTER = {"router_objective": "published", "route_patch": "unscaled", "seed": 5}
EARLIER = [
    ("TopK", ONE_SITE, (1.318642378, 141.0862885, 921.8757324)),
    ("Vanilla", ONE_SITE, (1.324784994, 264.7213440, 909.0931396)),
    ("Gated", ONE_SITE, (1.522570014, 292.2354431, 939.7561035)),
    ("JumpReLU", ONE_SITE, (1.332074165, 251.5095062, 911.4232178)),
    ("RandomK", ONE_SITE | {"seed": 5}, (1.277335882, -24.24690247, 951.4656372)),
    ("BatchTopK", ONE_SITE, (1.842567205, 284.3050842, 959.1291504)),
    ("MLSAE", SIZES, (1.383442283, 423.6410217, 1835.425110)),
    ("RouteSAE", SIZES | ROUTER, (1.381953477, 165.9783936, 1966.062317)),
    ("RouteSAE", SIZES | PUBLISHED_ROUTER, (1.552434444, 128.0154114, 1966.062317)),
    (
        "Crosscoder",
        SIZES | {"decoder_bias": True, "free_norms": True},
        (3.585265636, 634.15625, 2204.726746),
    ),
    ("Crosscoder", SIZES | {"l1_mean": True}, (2.962080479, 510.3641357, 2096.009552)),
]
BIASES = {"pre_bias": (8,), "latent_bias": (24,)}
DICTIONARY = BIASES | {"encoder.weight": (24, 8), "decoder.weight": (8, 24)}
GATES = {"gate_bias": (24,), "mag_bias": (24,), "r_mag": (24,)}


def earlier_shapes(name, config):
    """{key: shape} of a state dict as both versions wrote it."""
    if name == "Crosscoder":
        shapes = {"latent_bias": (24,)}
        if config.get("decoder_bias"):
            shapes["decoder_bias"] = (3, 8)
        for site in range(3):
            shapes |= {f"encoder.{site}.weight": (24, 8), f"decoder.{site}.weight": (8, 24)}
        return shapes
    if name == "RouteSAE":
        return {"router.weight": (3, 8)} | {f"sae.{key}": s for key, s in DICTIONARY.items()}
    shapes = dict(DICTIONARY)
    if name == "Gated":
        del shapes["latent_bias"]
        shapes |= GATES
    shapes |= {"JumpReLU": {"threshold": (24,)}, "BatchTopK": {"cut": ()}}.get(name, {})
    return shapes


def earlier_weights(name, config):
    """Random weights, the same in every version."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for key, shape in sorted(earlier_shapes(name, config).items()):
        weights[key] = 0.3 * torch.randn(shape, generator=generator)
        if key in ("threshold", "cut"):
            weights[key] = weights[key].abs()
    return weights


@pytest.mark.parametrize("name, config, expected", EARLIER)
def test_checkpoints_of_an_earlier_version_load_and_give_the_same_figures(
    name, config, expected, tmp_path
):
    path = tmp_path / f"{name}_text.pt"
    torch.save(earlier_weights(name, config), path)
    recipe = {"format_version": 1, "title": path.stem, "model": name, "config": config}
    files.save_json(recipe, path.with_suffix(".json"))
    sae, _ = checkpoint.load(path)
    generator = torch.Generator().manual_seed(8)
    hidden = {site: torch.randn(40, 8, generator=generator) + site for site in range(1, 5)}
    info = BatchInfo(token_keys=torch.arange(40))
    out = sae.autoencode(sae.gather(hidden), info)
    error = float(squared_errors(out.target, out.x_hat).mean())
    patched = 0.0
    for patches in sae.patches(hidden, info):
        patched += sum(float(patch(hidden[site]).abs().sum()) for site, patch in patches.items())
    assert (error, float(out.latents.sum()), patched) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------- recipe and weights


def test_a_kill_between_recipe_and_weights_leaves_the_earlier_sae(tmp_path, monkeypatch):
    path = save(tmp_path)
    before = sum_and_k(path)
    original = files.write_atomic

    for name in (".TopK_text.earlier.json", "TopK_text.json", "TopK_text.pt"):

        def killed(target, write, name=name):
            if os.path.basename(target) == name:
                raise Killed
            return original(target, write)

        # twice: the second save finds what the first one left
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(files, "write_atomic", killed)
                with pytest.raises(Killed):
                    save(tmp_path, k=7, seed=1)
            assert sum_and_k(path) == before
            assert checkpoint.trained_recipe(path)["config"]["k"] == 5
    save(tmp_path, k=7, seed=1)
    assert sum_and_k(path)[1] == 7 and sum_and_k(path)[0] != before[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["TopK_text.json", "TopK_text.pt"]


def test_weights_under_the_recipe_of_others_are_refused(tmp_path):
    path, other = save(tmp_path / "a"), save(tmp_path / "b", k=7, seed=1)
    shutil.copy(other.with_suffix(".json"), path.with_suffix(".json"))
    for read in (checkpoint.load, checkpoint.trained_recipe):
        with pytest.raises(ValueError, match="is not what its recipe describes"):
            read(path)
    recipe = json.loads(path.with_suffix(".json").read_text())
    del recipe["weights_sum"]  # as earlier versions wrote it
    path.with_suffix(".json").write_text(json.dumps(recipe))
    assert checkpoint.load(path)[0].k == 7


def test_an_exported_folder_of_two_halves_is_refused(tmp_path):
    first = export(random_sae("TopK"), tmp_path / "a", "hf")
    recipe = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(recipe | {"weights_sum": "0" * 16}))
    with pytest.raises(ValueError, match="not those of the recipe"):
        checkpoint.load(first)


def test_a_reader_beside_a_writer_gets_pairs(tmp_path):
    path = save(tmp_path)
    pairs = {sum_and_k(path)}
    save(tmp_path, k=7, seed=1)
    pairs.add(sum_and_k(path))
    child = os.fork()
    if not child:
        for i in range(60):
            save(tmp_path, *((5, 0) if i % 2 else (7, 1)))
        os._exit(0)
    done = 0
    while not done:
        assert sum_and_k(path) in pairs
        done, _ = os.waitpid(child, os.WNOHANG)


def test_weights_without_a_recipe_are_not_taken_for_trained(tmp_path):
    assert checkpoint.trained_recipe(tmp_path / "TopK_text.pt") is None
    path = tmp_path / "TopK_text.pt"
    torch.save({"precious": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="may be anybody's.*--overwrite"):
        checkpoint.trained_recipe(path)


def test_a_training_does_not_replace_weights_that_have_no_recipe(tmp_path, capsys):
    write_text(tmp_path)
    path = tmp_path / "out" / "SAE_models" / "TopK_t.pt"
    path.parent.mkdir(parents=True)
    torch.save({"precious": torch.zeros(3)}, path)
    before = path.read_bytes()
    code, printed = train(tmp_path, capsys)
    assert code == 2 and "may be anybody's" in printed and path.read_bytes() == before
    assert train(tmp_path, capsys, "--overwrite")[0] == 0 and path.read_bytes() != before


def test_values_that_differ_in_the_last_digits_have_titles_of_their_own(tmp_path):
    argv = ["--model", "Vanilla", "--data_path", "t.jsonl", "--output_dir", str(tmp_path)]
    coefficients = ["0.01000001", "0.01000002", "0.01", "5", "1e-05"]
    titles = Trainer(parse("train", [*argv, "--l1_coeff", *coefficients])).titles
    assert len(set(titles)) == 5
    assert titles[2:] == [
        "Vanilla_t_l1_coeff0.01",
        "Vanilla_t_l1_coeff5",
        "Vanilla_t_l1_coeff1e-05",
    ]
    assert Trainer(parse("train", [*argv, "--l1_coeff", "0.01", "1e-2"])).titles == ["Vanilla_t"]


# ------------------------------------------------------------------------------- export


@pytest.mark.parametrize("name", ["os.replace", "shutil.rmtree", "os.fsync", "files._exchange"])
@pytest.mark.parametrize("has_exchange", [True, False])
def test_an_export_killed_while_it_replaces_leaves_the_old_or_the_new(
    tmp_path, monkeypatch, name, has_exchange
):
    sae = random_sae("TopK")
    folder = export(sae, tmp_path, "hf")
    old = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        sae.encoder.weight.mul_(2)
    if not has_exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    module_name, function = name.split(".")
    module = {"os": os, "shutil": shutil, "files": files}[module_name]
    original = getattr(module, function)
    for killed_call in range(4):
        for is_done in (False, True):
            child = os.fork()
            if not child:
                calls = []

                def killing(*args, calls=calls, call=killed_call, done=is_done, **options):
                    calls.append(args)
                    if len(calls) - 1 != call:
                        return original(*args, **options)
                    if done:
                        original(*args, **options)
                    os._exit(9)

                setattr(module, function, killing)
                export_formats.export(sae, recipe_of(sae), tmp_path, "hf", overwrite=True)
                os._exit(0)
            os.waitpid(child, 0)
            files.restore_folder(folder)
            weights = (folder / "model.safetensors").read_bytes()
            assert weights == old or checkpoint.load(folder)
            assert (folder / "README.md").exists() and (folder / "config.json").exists()
    export_formats.export(sae, recipe_of(sae), tmp_path, "hf", overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "model.safetensors").read_bytes() != old


@pytest.mark.parametrize("kind", ["hf", "saelens"])
def test_weights_that_are_not_finite_are_not_exported(tmp_path, kind):
    sae = random_sae("TopK")
    with torch.no_grad():
        sae.encoder.weight[3] = float("nan")
    with pytest.raises(ValueError, match="encoder.weight has .* not finite"):
        export(sae, tmp_path, kind)
    assert not (tmp_path / "export").exists()
    if kind == "saelens":
        with pytest.raises(ValueError, match="gives other latents"):
            formats.site_saes(sae)


# -------------------------------------------------------------------------- weights of others


def only(weights, **changed):
    return weights | changed


TENSORS = {
    "nan": (lambda w: only(w, **{"encoder.weight": w["encoder.weight"] * float("nan")}), "finite"),
    "inf": (lambda w: only(w, latent_bias=w["latent_bias"] / 0), "latent_bias has .* not finite"),
    "sparse": (
        lambda w: only(w, **{"encoder.weight": w["encoder.weight"].to_sparse()}),
        "encoder.weight is no dense tensor",
    ),
    "integer key": (lambda w: w | {1: torch.zeros(2)}, "has the key 1"),
    "one dimension": (lambda w: {"encoder.weight": torch.zeros(8)}, "missing|is \\(8,\\)"),
    "expanded": (
        lambda w: {key: torch.zeros(1).expand(value.shape) for key, value in w.items()},
        "fewer values than that",
    ),
    "meta": (lambda w: {key: value.to("meta") for key, value in w.items()}, "no dense|readable"),
}
for dtype in (torch.bool, torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn):
    TENSORS[str(dtype)] = (
        lambda w, dtype=dtype: {key: value.to(dtype) for key, value in w.items()},
        "values; weights are",
    )


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("has_recipe", [True, False])
def test_tensors_that_are_no_weights_are_named(tmp_path, kind, has_recipe):
    path = save(tmp_path)
    make, reason = TENSORS[kind]
    torch.save(make(torch.load(path, weights_only=True)), path)
    if not has_recipe:
        path.with_suffix(".json").unlink()
        reason += "|holds no encoder"
    elif kind == "one dimension":
        recipe = json.loads(path.with_suffix(".json").read_text())
        del recipe["weights_sum"]
        path.with_suffix(".json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=reason) as caught:
        checkpoint.load(path)
    assert "TopK_text" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floating_types_load(tmp_path, dtype):
    path = save(tmp_path)
    torch.save({k: v.to(dtype) for k, v in torch.load(path).items()}, path)
    if dtype is not torch.float64:  # rounded, so they are other weights
        with pytest.raises(ValueError, match="remove weights_sum from the recipe"):
            checkpoint.load(path)
        recipe = json.loads(path.with_suffix(".json").read_text())
        del recipe["weights_sum"]
        path.with_suffix(".json").write_text(json.dumps(recipe))
    assert checkpoint.load(path)[0].encoder.weight.dtype == torch.float32


def test_nan_and_integers_in_safetensors_are_named(tmp_path):
    from safetensors.torch import save_file

    hub = export(random_sae("TopK"), tmp_path, "hf") / "model.safetensors"
    lens = saelens_folder(tmp_path / "lens", "topk") / "sae_weights.safetensors"
    for path in (hub, lens):
        tensors = tensor_files.read_safetensors(path)
        name = next(iter(tensors))
        for bad in (tensors[name] * float("nan"), tensors[name].to(torch.int8)):
            save_file(tensors | {name: bad}, path)
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                checkpoint.load(path.parent)


def test_a_compressed_file_is_not_unpacked(tmp_path):
    path = save(tmp_path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries:
            archive.writestr(entry.filename, content)
    with pytest.raises(ValueError, match="is compressed"):
        checkpoint.load(path)


SIZES = [
    {"latent_size": 3 * 10**7},
    {"latent_size": 10**9},
    {"latent_size": 10**30},
    {"hidden_size": 10**12},
    {"latent_size": 10**18, "hidden_size": 10**18},
    {"n_layers": 10**9},
    {"layer": 10**9},
    {"norm_eps": float("nan")},
    {"norm_eps": -1},
    {"norm_eps": "x"},
    {"k": 2.5},
    {"k": True},
    {"k": [1, 2]},
    {"layer": 2.5},
    {"b_pre_init": "zzz"},
    {"topk_relu": "no"},
    {"dead_tokens": -5},
    {"input_norm": [1]},
]
ROUTED = [
    {"n_layers": 10**8},
    {"end_layer": 10**9, "n_layers": None},
    {"start_layer": 0},
    {"end_layer": -3},
    {"routing": "evil"},
    {"route_shares": [1e308] * 3},
    {"aggre": "evil"},
    {"router_objective": 5},
]


@pytest.mark.parametrize(
    "name, values", [("TopK", v) for v in SIZES] + [("RouteSAE", v) for v in ROUTED]
)
def test_a_recipe_of_impossible_values_is_refused_before_anything_is_built(
    tmp_path, name, values, monkeypatch
):
    sae = random_sae(name)
    path = checkpoint.save(sae, recipe_of(sae), tmp_path, "x")
    change(path, **values)
    built = []

    def recorded(*args):
        built.append(torch.empty(0).device.type)
        return build(*args)

    monkeypatch.setattr(checkpoint.model, "build", recorded)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="recipe") as caught:
        checkpoint.load(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert "\n" not in str(caught.value) and grown < 200_000  # kB
    assert set(built) <= {"meta"}


@pytest.mark.parametrize(
    "entries",
    [
        {"tokens": "many"},
        {"sites": 5},
        {"weights_sum": 5},
        {"final": {"step_tokens_per_s": {"a": [1]}}},
        {"final": {"loss": "x"}},
        {"final": 3},
    ],
)
def test_entries_of_another_type_are_one_line(tmp_path, entries):
    path = save(tmp_path)
    recipe = json.loads(path.with_suffix(".json").read_text()) | entries
    path.with_suffix(".json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="of the wrong type"):
        checkpoint.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named_with_their_place(tmp_path, value):
    data = {"a": 1.0, "latents": [{"x": (1.0, {"y": value})}]}
    with pytest.raises(ValueError, match="^latents 0 x 1 y is no finite number"):
        files.save_json(data, tmp_path / "a.json")
    sae = random_sae("TopK")
    with pytest.raises(ValueError, match="^final loss is no finite number"):
        export(sae, tmp_path, "hf", final={"loss": value})


def test_a_pipe_or_device_in_the_place_of_a_file_is_named(tmp_path):
    path = save(tmp_path)
    for plant in (os.mkfifo, lambda name: os.symlink("/dev/zero", name)):
        path.with_suffix(".json").unlink()
        plant(path.with_suffix(".json"))
        with pytest.raises(files.Unusable, match="TopK_text.json is no regular file"):
            checkpoint.load(path)
    (tmp_path / "z_contexts.json").mkdir()
    (tmp_path / "a_contexts.json").write_text("{}")
    assert files.newest(tmp_path, "*_contexts.json").name == "a_contexts.json"


def test_entries_of_a_file_that_overlap_are_refused(tmp_path):
    path = save(tmp_path)
    content = path.read_bytes()
    at = content.rfind(b"PK\5\6")
    count, size, start = struct.unpack_from("<HII", content, at + 10)
    # The directory names each entry 100 times; torch would take memory for each.
    end = bytearray(content[at:])
    struct.pack_into("<HHII", end, 8, 100 * count, 100 * count, 100 * size, start)
    path.write_bytes(content[:start] + 100 * content[start : start + size] + end)
    with pytest.raises(ValueError, match="entries that overlap"):
        checkpoint.load(path)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EACCES, errno.EIO])
def test_a_file_system_that_syncs_no_folders_is_written_to(tmp_path, monkeypatch, number):
    original = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)

    def write():
        return files.write_folder(tmp_path / "x", {"a": lambda file: file.write(b"1")})

    if number == errno.EIO:  # of a disk that fails, which is named
        with pytest.raises(OSError, match="Input/output error") as failure:
            write()
        assert str(tmp_path) in failure.value.filename
    else:
        files.verify_folder(write())


@pytest.mark.parametrize("what", ["weights", "folder", "json", "lock"])
def test_a_disk_that_is_full_is_named_with_its_file_and_keeps_the_old_result(tmp_path, what):
    path = save(tmp_path)
    before = sum_and_k(path)
    export(random_sae("TopK"), tmp_path, "hf")
    child = os.fork()
    if not child:  # its files may not grow beyond a few bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        message = ""
        try:
            if what == "weights":
                sae = random_sae("TopK", k=7)
                weights = sae.state_dict()
                write = functools.partial(torch.save, weights)
                files.write_atomic(path, functools.partial(files.save_through, write))
            elif what == "folder":
                sae = random_sae("TopK")
                export_formats.export(sae, recipe_of(sae), tmp_path, "hf", overwrite=True)
            elif what == "lock":
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
                with files.locked(tmp_path, "a.lock"):
                    pass
            else:
                files.save_json({"a": "x" * 5000}, tmp_path / "big.json")
        except OSError as error:
            message = str(error)
        names = {"weights": "TopK_text.pt", "folder": "model.safetensors", "json": "big.json"}
        names["lock"] = "a.lock"
        os._exit(0 if "File too large" in message and names[what] in message else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sum_and_k(path) == before
    assert checkpoint.load(tmp_path / "export" / "hf" / "TopK_text")
    assert not list(tmp_path.rglob(".t*")) and not list(tmp_path.rglob(".T*.tmp"))


def test_a_clock_that_goes_back_changes_no_figure(tmp_path, capsys, monkeypatch):
    write_text(tmp_path)
    start = time.time()
    elapsed = itertools.count(0, 3600)
    monkeypatch.setattr(time, "time", lambda: start - next(elapsed))
    assert train(tmp_path, capsys)[0] == 0
    recipe = checkpoint.read_recipe(tmp_path / "out" / "SAE_models" / "TopK_t.pt")
    assert recipe["estimate"]["seconds_used"] >= 0
    assert 0 < recipe["final"]["tokens_per_s"] < 1e8


def test_scripts_need_no_home():
    command = "set -eu; . scripts/env_setup.sh; echo $HF_HOME"
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HOME", "HF_HOME")
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=files.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("/.cache/huggingface"), done.stderr


def test_a_dangling_link_among_checkpoints_is_passed_over(tmp_path):
    path = save(tmp_path / "SAE_models")
    (path.parent / "old.pt").symlink_to(tmp_path / "nowhere")
    assert checkpoint.newest(tmp_path) == path
