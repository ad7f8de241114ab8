"""Several processes that work as one, with gloo on the CPU.

All end with the same weights, the numbers are those of one process, one process writes, and all
end together. The processes are forked from a server that has imported torch and transformers; they
get the environment that torchrun would give them.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from src import distributed, files
from src.applier import Applier
from src.config import complete, parse, run_stage
from src.evaluator import Evaluator
from src.events import Events, Table
from src.files import DEMO_LM
from src.metrics import Reconstruction
from src.model import build
from src.ops import kth_largest
from src.sae import BatchInfo, SAEOutput
from src.sae_training import LocalBatch, SAETraining, make_optimizer
from src.trainer import Trainer

MODELS = ["TopK", "RouteSAE", "BatchTopK", "JumpReLU", "Gated", "Crosscoder", "MLSAE"]


@pytest.fixture(scope="module")
def server():
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["src.trainer", "src.evaluator", "src.applier", "transformers.models.llama.modeling_llama"]
    )
    return context


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(language model of 8 blocks, text)"""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_LM)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    sentence = "Return the {}th of {} values in {}, or raise ValueError if none is left. "
    texts = [sentence.format(i, i * i, chr(97 + i % 26)) * 3 for i in range(160)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder / "lm", folder / "text.jsonl"


def arguments(tiny, out, *options):
    model_path, data_path = tiny
    argv = ["--model_path", model_path, "--data_path", data_path, "--output_dir", out]
    argv += ["--dtype", "float32", "--device", "cpu", "--latent_size", 64, "--k", 4]
    argv += ["--max_length", 16, "--batch_size", 5, "--max_samples", 121, "--tag", "t"]
    return [str(word) for word in (*argv, *options)]


# Functions that change a process before it starts: hook(number, folder).


def weights_of(run):
    return b"".join(t.detach().numpy().tobytes() for t in run._tensors().values())


def save_fingerprint_at_the_end(number, folder):
    finish = Trainer._finish

    def save_and_finish(self, runs, *rest):
        sums = {run.title: hashlib.sha256(weights_of(run)).hexdigest() for run in runs}
        (folder / f"sums{number}.json").write_text(json.dumps(sums))
        return finish(self, runs, *rest)

    Trainer._finish = save_and_finish


def only_the_main_one_writes(number, folder):
    save_fingerprint_at_the_end(number, folder)
    if number:
        for name in ("write_atomic", "write_folder", "probe", "save_json"):
            setattr(files, name, None)


def change_states(number, change):
    """In process 1, at step 5, put change(hidden) in the place of the hidden states."""
    original, done = SAETraining.step, []

    def step(self, batch, now, due):
        if number == 1 and now == 5 and not done:
            done.append(True)
            batch = batch._replace(hidden=change(batch.hidden))
        original(self, batch, now, due)

    SAETraining.step = step


def terminated(number, folder):
    def terminate(hidden):
        os.kill(os.getpid(), signal.SIGTERM)
        return hidden

    change_states(number, terminate)


def killed(number, folder):
    change_states(number, lambda hidden: os.kill(os.getpid(), signal.SIGKILL))


def poisoned(number, folder):
    change_states(number, lambda hidden: {site: h * float("nan") for site, h in hidden.items()})


def short_of_memory(number, folder):
    gradients, finish = SAETraining._gradients, Trainer._finish

    def limited(self, batch, *rest):
        if number == 1 and len(batch.token_keys) / self.parts > 15:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradients(self, batch, *rest)

    def save_and_finish(self, runs, *rest):
        (folder / f"parts{number}").write_text(str([run.parts for run in runs]))
        return finish(self, runs, *rest)

    SAETraining._gradients = limited
    Trainer._finish = save_and_finish


def late(number, folder):
    time.sleep(3 * number)


def child(number, world, port, stage, argv, hook, folder):
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "DATA_DIR": str(folder),
    }
    for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
        path = folder / f"{stage}{number}.{suffix}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    torch.set_num_threads(1)
    if hook is not None:
        hook(number, folder)
    stage_class = {"train": Trainer, "evaluate": Evaluator, "apply": Applier}[stage]
    sys.exit(run_stage(stage, lambda cfg: stage_class(cfg).run(), argv))


def together(server, world, stage, argv, folder, hook=None, more=()):
    """(exit codes of `world` processes, the error lines that they printed)

    more: options that the last process has beside those of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # torchrun holds such a store for its processes.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for number in range(world):
        own_argv = [*argv, *(more if number == world - 1 else ())]
        args = (number, world, store.port, stage, own_argv, hook, folder)
        processes.append(server.Process(target=child, args=args))
        processes[-1].start()
    deadline = time.monotonic() + 180
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    hanging = [number for number, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    lines = []
    for number in range(world):
        lines += (folder / f"{stage}{number}.err").read_text().splitlines()
    errors = [line for line in lines if line.startswith(f"{stage}.py:")]
    assert not hanging, f"{hanging} did not end: {errors}"
    return [process.exitcode for process in processes], errors


def read_metrics(folder):
    """Lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "runs" / "t" / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if "tokens_per_s" not in k} for line in lines]


def largest_loss_gap(folder, other_folder):
    lines, others = read_metrics(folder), read_metrics(other_folder)
    gap = 0.0
    for line, other in zip(lines, others, strict=True):
        assert set(line) == set(other)
        assert all(line[key] == other[key] for key in ("sae", "step", "tokens"))
        gap = max(gap, abs(line["loss"] - other["loss"]))
    return gap


SCIENCE = ["--dead_tokens", "300", "--target_l0", "8"]
SCIENCE += ["--router_objective", "advantage", "--router_balance", "switch"]
OPTIONS = ["--model", *MODELS, *SCIENCE]


@pytest.fixture(scope="module")
def alone(server, tiny, tmp_path_factory):
    """Folder of a training by one process: 25 steps of 5 rows, the last of 1."""
    folder = tmp_path_factory.mktemp("alone")
    codes, errors = together(server, 1, "train", arguments(tiny, folder, *OPTIONS), folder)
    assert codes == [0], errors
    return folder


def assert_same_as_alone(folder, world, alone):
    """All processes end with the same bits, and the losses are those of one process."""
    sums = [json.loads((folder / f"sums{n}.json").read_text()) for n in range(world)]
    assert len(sums[0]) == len(MODELS)
    assert all(other == sums[0] for other in sums)
    gap = largest_loss_gap(alone, folder)
    print(f"{world} processes and one: losses differ by up to {gap:.2g}")
    assert gap < 1e-5


def test_two_processes_end_with_the_same_bits_and_the_losses_of_one(server, tiny, tmp_path, alone):
    argv = arguments(tiny, tmp_path, *OPTIONS)
    codes, errors = together(server, 2, "train", argv, tmp_path, only_the_main_one_writes)
    assert codes == [0, 0], errors
    assert any("AuxK" in line for line in read_metrics(alone))
    assert_same_as_alone(tmp_path, 2, alone)


def test_a_signal_to_one_process_stops_all_at_the_same_step_and_another_number_of_them_continues(
    server, tiny, tmp_path, alone
):
    argv = arguments(tiny, tmp_path, *OPTIONS)
    codes, errors = together(server, 2, "train", argv, tmp_path, terminated)
    assert codes == [143, 143] and len(errors) == 1, errors
    assert "step 6 of 25 is saved" in errors[0]
    codes, errors = together(server, 3, "train", argv, tmp_path, only_the_main_one_writes)
    assert codes == [0, 0, 0], errors
    assert "continuing at step 6 of 25" in (tmp_path / "train0.out").read_text()
    assert not (tmp_path / "train1.out").read_text()
    assert_same_as_alone(tmp_path, 3, alone)


def test_a_killed_process_ends_the_job_with_one_line_and_one_process_continues(
    server, tiny, tmp_path, alone
):
    argv = arguments(tiny, tmp_path, *OPTIONS, "--save_every", "2")
    started = time.monotonic()
    codes, errors = together(server, 2, "train", argv, tmp_path, killed)
    print(f"from the start to the end of all: {time.monotonic() - started:.1f} s")
    assert codes == [4, -signal.SIGKILL] and len(errors) == 1, (codes, errors)
    assert "lost another one" in errors[0]
    codes, errors = together(server, 1, "train", argv, tmp_path)
    assert codes == [0], errors
    assert "continuing at step 4 of 25" in (tmp_path / "train0.out").read_text()
    assert largest_loss_gap(alone, tmp_path) < 1e-5


def test_a_value_in_one_process_that_is_not_finite_stops_the_run_in_all_and_its_whole_batch_is_kept(
    server, tiny, tmp_path
):
    codes, errors = together(server, 2, "train", arguments(tiny, tmp_path), tmp_path, poisoned)
    assert codes == [2, 2] and len(errors) == 1, (codes, errors)
    assert "loss is not finite at step 5 (NormMSE nan" in errors[0]
    dump = json.loads((tmp_path / "runs" / "t" / "nonfinite-TopK_text_t-step5.json").read_text())
    assert len(dump["input_ids"]) == 5


def test_the_process_with_the_least_memory_decides_the_slices_of_all(server, tiny, tmp_path):
    # AuxK divides by a variance, which is that of each slice.
    options = [*SCIENCE, "--auxk_coeff", "0", "--model", "Gated", "Crosscoder"]
    alone = tmp_path / "alone"
    codes, errors = together(server, 1, "train", arguments(tiny, alone, *options), alone)
    assert codes == [0], errors
    argv = arguments(tiny, tmp_path, *options)
    codes, errors = together(server, 2, "train", argv, tmp_path, short_of_memory)
    assert codes == [0, 0], errors
    assert [(tmp_path / f"parts{n}").read_text() for n in (0, 1)] == ["[4, 4]", "[4, 4]"]
    losses = {(line["sae"], line["step"]): line["loss"] for line in read_metrics(alone)}
    for line in read_metrics(tmp_path):
        assert abs(line["loss"] - losses[line["sae"], line["step"]]) < 1e-5


def test_an_error_is_said_once_and_processes_that_come_late_are_waited_for(server, tiny, tmp_path):
    argv = arguments(tiny, tmp_path, "--layer", "9")
    codes, errors = together(server, 2, "train", argv, tmp_path)
    assert codes == [2, 2] and len(errors) == 1, errors
    assert "layer 9 of a 8-block model" in errors[0]
    argv = arguments(tiny, tmp_path, "--max_samples", "5")
    codes, errors = together(server, 2, "train", argv, tmp_path, late)
    assert codes == [0, 0], errors


def test_processes_with_other_options_weights_or_text_are_refused_at_the_start(
    server, tiny, tmp_path
):
    from transformers import AutoModelForCausalLM

    model_path, data_path = tiny
    shutil.copytree(model_path, tmp_path / "lm")
    language_model = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        for parameter in language_model.parameters():
            parameter.mul_(1.5)
    language_model.save_pretrained(tmp_path / "lm")
    other_text = tmp_path / "other" / "text.jsonl"
    other_text.parent.mkdir()
    other_text.write_text(data_path.read_text().replace("Return", "Reduce"))
    different = {
        "--lr": "0.5",
        "--seed": "7",
        "--k": "8",
        "--layer": "3",
        "--batch_size": "4",
        "--model": "RouteSAE",
        "--model_path": str(tmp_path / "lm"),
        "--data_path": str(other_text),
    }
    messages = {"--model_path": "language model", "--data_path": "a text of the sum"}
    for option, value in different.items():
        out = tmp_path / option
        argv = arguments(tiny, out)
        codes, errors = together(server, 2, "train", argv, out, more=[option, value])
        assert codes == [2, 2] and len(errors) == 1, (option, codes, errors)
        assert f"process 1 of 2 has {messages.get(option, option)}" in errors[0], errors
        assert not list(out.glob("SAE_models/*")) and not list(out.rglob("step-*")), option


def test_evaluation_and_contexts_of_two_processes_are_those_of_one_to_the_last_digit(
    server, tiny, tmp_path, alone
):
    def saes(*names):
        return ["--SAE_path", *(f"{alone}/SAE_models/{name}_text_t.pt" for name in names)]

    text = ["--data_path", str(tiny[1]), "--split", "all", "--batch_size", "3"]
    text += ["--max_samples", "14", "--device", "cpu", "--dtype", "float32"]
    evaluation = [*saes("TopK", "RouteSAE", "BatchTopK", "MLSAE"), "--metric", "all"]
    application = ["--lines", "1", "--act_threshold", "0", "--top_n", "3"]
    argv = [*saes("TopK"), "--output_dir", str(tmp_path / "x"), *text]
    for stage, more in (("evaluate", saes("MLSAE")), ("apply", ["--lines", "7"])):
        codes, errors = together(server, 2, stage, argv, tmp_path / stage, more=more)
        assert codes == [2, 2] and "process 1 of 2 has" in errors[0], (codes, errors)
    for world in (1, 2):
        out = tmp_path / str(world)
        argv = [*evaluation, "--output_dir", str(out), *text]
        codes, errors = together(server, world, "evaluate", argv, out)
        assert codes == [0] * world, errors
        for name in ("RouteSAE", "MLSAE"):
            argv = [*saes(name), "--output_dir", str(out), *application, *text]
            hook = only_the_main_one_writes if world > 1 else None
            codes, errors = together(server, world, "apply", argv, out, hook)
            assert codes == [0] * world, errors
    evaluations = sorted((tmp_path / "1").glob("eval/*.json"))
    contexts = sorted((tmp_path / "1").glob("contexts/*.json"))
    assert (len(evaluations), len(contexts)) == (4, 2)
    for path in evaluations + contexts:
        other = tmp_path / "2" / path.relative_to(tmp_path / "1")
        assert path.read_text() == other.read_text(), path


# ------------------------------------------------------------------------------------- the parts


def test_what_was_on_the_cpu_arrives_there_and_the_rest_on_the_device_asked_for(monkeypatch):
    def gather(content, gathered):
        gathered[:] = [content, content]

    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "main", lambda: True)
    monkeypatch.setattr(distributed.dist, "gather_object", gather)
    # The device "meta" stands for a GPU.
    sent = {"window": torch.arange(3), "sum": torch.zeros(2, device="meta")}
    _, arrived = distributed.to_main(sent, "meta")
    assert arrived["window"].tolist() == [0, 1, 2]
    assert arrived["sum"].device.type == "meta"
    _, arrived = distributed.to_main({"window": sent["window"]}, "cpu")
    assert arrived["window"].tolist() == [0, 1, 2]


def test_the_kth_largest_is_found_among_ties_shares_and_too_few_values():
    torch.manual_seed(0)
    special = torch.tensor([float("nan"), float("-inf")])
    ties, tiny_values = torch.full((50,), 1.5), torch.rand(100) * 1e-30
    values = torch.cat([torch.randn(3000), ties, tiny_values, special])
    positive = values[values > 0].sort(descending=True).values
    for k in (1, 7, 250, 300, 1000, len(positive)):
        assert kth_largest(values, k) == positive[k - 1], k
    assert kth_largest(values, len(positive) + 1) == 0


def test_processes_with_a_share_of_the_values_each_find_the_kth_largest_of_all():
    torch.manual_seed(0)
    values = torch.randn(3000)
    shares = values.split(1000)
    barrier = threading.Barrier(3)
    addends = [None] * 3

    def find(number):
        def all_sum(x):
            addends[number] = x
            barrier.wait()
            total = sum(addends)
            # Nobody may write its next addend before all have read this one.
            barrier.wait()
            return total

        return kth_largest(shares[number], 75, all_sum)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(find, range(3)))
    expected = values.sort(descending=True).values[3 * 75 - 1]
    assert all(result == expected for result in results)


def test_sums_do_not_depend_on_their_order_or_on_who_adds():
    torch.manual_seed(0)
    batches = [(torch.randn(7, 5) * 10.0 ** (i % 9), torch.randn(7, 5)) for i in range(40)]

    def measured(batches):
        metric = Reconstruction()
        for target, x_hat in batches:
            metric.update(SAEOutput(target, None, x_hat))
        return metric

    expected = measured(batches).compute()
    assert measured(batches[::-1]).compute() == expected
    merged, *others = (measured(batches[i::3]) for i in range(3))
    for other in others:
        merged.merge(other)
    assert merged.compute() == expected


def random_events(row, n=40):
    """Events of 6 latents in 3 groups; many have the same score."""
    return Events(
        torch.randint(6, (n,)),
        torch.zeros(n),
        torch.randint(3, (n,)),
        torch.full((n,), row),
        torch.arange(n) // 2,
        torch.arange(n) % 2,
        torch.ones(n),
        torch.randint(5, (n,)).float(),
        torch.zeros(n, 3).half(),
    )


def test_tables_over_parts_of_a_text_hold_what_one_table_over_all_of_it_would():
    torch.manual_seed(0)

    def table_of(parts):
        table = Table(6, 9, 2)
        for events in parts:
            allowed = events.score >= 0  # all of them
            chosen = table.candidates(events.latent, events.group, events.score, allowed)
            table.add(events.take(chosen))
        return table

    rows = [random_events(row) for row in range(12)]
    whole = table_of(rows)
    merged, *others = (table_of(rows[i::3]) for i in range(3))
    merged.merge([other.kept for other in others])
    assert all(torch.equal(a, b) for a, b in zip(whole.kept, merged.kept, strict=True))


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_a_fault_read_late_has_changed_nothing_and_names_its_step(optimizer, monkeypatch):
    argv = ["--optimizer", optimizer, "--latent_size", "64", "--k", "4", "--steps", "1"]
    cfg = complete(parse("train", argv))
    torch.manual_seed(0)
    sae = build("RouteSAE", 32, 8, {"latent_size": 64, "k": 4})
    run = SAETraining(sae, "x", {}, cfg, 20)
    run.mode(True)
    check = run.check
    # On a GPU the flag is read only at reports.
    monkeypatch.setattr(run, "check", lambda: None)
    for step in range(6):
        hidden = {site: torch.randn(20, 32) for site in sae.sites()}
        if step == 3:
            before = [p.clone() for p in sae.parameters()]
            hidden[4][7, 5] = float("inf")
        run.step(LocalBatch(hidden, torch.arange(20), 20, 0), step, False)
    check()
    assert run.failed_step == 3 and "not finite at step 3" in run.failed
    assert all(torch.equal(a, b) for a, b in zip(before, sae.parameters(), strict=True))


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_signum_makes_the_steps_of_a_schedule_free_mean(power):
    """Against the three sequences written out: z, their mean x, and y between them."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5), [torch.randn(5) for _ in range(7)]
    p = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer("signum", [p], 0.1, (0.9, 0.999), power)
    optimizer.train()
    z = x = start
    for k, gradient in enumerate(gradients, 1):
        p.grad = gradient
        optimizer.step()
        z = z - 0.1 * gradient.sign()
        x = x + (z - x) * (power + 1) / (power + k)
        assert torch.allclose(p, 0.05 * z + 0.95 * x, atol=1e-6)
    optimizer.eval()
    assert torch.allclose(p, x, atol=1e-6)


def loss_and_gradients(sae, hidden, slices):
    """The loss of a batch of 20 tokens and its gradients, summed over slices of it."""
    sae.zero_grad()
    total = 0.0
    for start, stop in slices:
        info = BatchInfo(torch.arange(start, stop), batch_tokens=20, token_offset=start)
        x = sae.gather({site: h[start:stop] for site, h in hidden.items()})
        loss = sum(sae.loss(sae.autoencode(x, info), info).values())
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in sae.parameters() if p.grad is not None]


# BatchTopK chooses over the batch: its slices need one another.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "BatchTopK"])
def test_slices_of_a_batch_add_up_to_its_loss_and_gradient(name):
    torch.manual_seed(0)
    sae = build(name, 32, 8, {"latent_size": 64, "k": 4, "auxk_coeff": 0.0})
    hidden = {site: torch.randn(20, 32) for site in sae.sites()}
    loss, gradients = loss_and_gradients(sae, hidden, [(0, 20)])
    sliced_loss, sliced_gradients = loss_and_gradients(sae, hidden, [(0, 3), (3, 3), (3, 20)])
    assert sliced_loss == pytest.approx(loss, abs=1e-6)
    for gradient, sliced in zip(gradients, sliced_gradients, strict=True):
        assert torch.allclose(gradient, sliced, atol=1e-6)


# --------------------------------------------------------------------------- what starts the job

SRUN = """#!/bin/bash
echo srun "$@" >> CALLS
trap "exit 143" TERM
for i in $(seq ${SECONDS_TO_RUN}0); do sleep .1; done
exit $EXIT_CODE
"""
SCONTROL = """#!/bin/bash
echo scontrol "$@" >> CALLS
[ "$1" != show ] || printf "one\\ntwo\\n"
"""


def catches(pid, signal_number):
    """Whether a process has a handler of its own for a signal. Linux says so."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
    return bool(caught >> (signal_number - 1) & 1)


@pytest.fixture
def slurm(tmp_path):
    """A function that runs the batch script; it returns (exit code, commands called, output).

    Its srun ends after some seconds with the code asked for, or with 143 once it gets SIGTERM.
    """
    root, commands, calls = tmp_path / "checkout", tmp_path / "bin", tmp_path / "calls"
    shutil.copytree(files.ROOT / "scripts", root / "scripts")
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "installed").touch()
    commands.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(script.replace("CALLS", str(calls)))
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(root),
    }
    script = root / "scripts" / "slurm_train.sh"

    def start(exit_code, seconds=0, signal_number=None):
        calls.unlink(missing_ok=True)
        process = subprocess.Popen(
            ["bash", str(script), "--k", "32 64"],
            env=environment | {"EXIT_CODE": str(exit_code), "SECONDS_TO_RUN": str(seconds)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        if signal_number is not None:
            while not calls.exists() or "srun" not in calls.read_text():
                time.sleep(0.05)
            # The batch script sets its trap after it has started srun.
            while not catches(process.pid, signal_number):
                time.sleep(0.05)
            process.send_signal(signal_number)
        output = process.communicate(timeout=120)[0]
        return process.returncode, calls.read_text().splitlines(), output

    return start


def test_the_batch_script_queues_itself_again_after_saving_and_only_then(slurm):
    code, calls, output = slurm(0, 50, signal.SIGUSR1)
    assert code == 0
    assert calls[-1] == "scontrol requeue 4242" and "queued again" in output
    (call,) = (call for call in calls if call.startswith("srun"))
    assert call.startswith("srun torchrun --nnodes 2 --nproc_per_node 8")
    assert "--rdzv_endpoint one:24242 train.py --k 32 64" in call
    for exit_code, is_requeued in ((143, True), (0, False), (2, False)):
        code, calls, _ = slurm(exit_code)
        assert code == (0 if is_requeued else exit_code)
        assert ("scontrol requeue 4242" in calls) == is_requeued


def test_the_commands_of_the_page_are_commands():
    page = (files.ROOT / "docs" / "several_gpus.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    assert len(blocks) >= 4
    call = re.compile(r"(train|evaluate|apply)(?:\.py|\.sh)((?: +[^\n#&|]+)?)")
    for block in blocks:
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, block
        for stage, options in call.findall(block.replace("\\\n", " ")):
            parse(stage, shlex.split(options))


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"])
def test_an_environment_of_a_job_that_is_none_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "two")
    argv = ["--output_dir", str(tmp_path)]
    assert run_stage("train", lambda cfg: None, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name} is 'two'" in line and "torchrun" in line


def test_latents_cut_by_dtensor_give_the_loss_of_one_process_and_are_gathered_for_it():
    command = [sys.executable, "-m", "benchmarks.sharding", "--processes", "2"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    rows = {row[0]: row for row in cells}
    assert float(rows["difference of the loss"][1]) < 1e-5
    assert float(rows["difference of the gradients"][1]) < 1e-5
    received, least = map(float, rows["top-k of the latents"][2:])
    assert received > 10 * least  # why docs/scale.md does not build on it
