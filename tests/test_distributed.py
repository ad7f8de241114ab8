"""Several processes as one (gloo, on the CPU): the same weights in each, the same numbers as one process, one writer, one end.

The processes are forked from a server that has torch and transformers imported, with the environment that torchrun would give them.
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
import time

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
from src.sae_training import SAETraining, make_optimizer
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
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    lines = [
        {
            "text": f"Return the {i}th of {i * i} values in {chr(97 + i % 26)}, or raise ValueError if none is left. "
            * 3
        }
        for i in range(160)
    ]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "lm", folder / "text.jsonl"


def arguments(tiny, out, *more):
    base = [
        "--model_path",
        tiny[0],
        "--data_path",
        tiny[1],
        "--output_dir",
        out,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--latent_size",
        64,
    ]
    return [
        str(one)
        for one in (
            *base,
            "--k",
            4,
            "--max_length",
            16,
            "--batch_size",
            5,
            "--max_samples",
            121,
            "--tag",
            "t",
            *more,
        )
    ]


def fingerprint_at_the_end(number, folder):
    finish = Trainer._finish

    def and_say(self, runs, *rest):
        sums = {
            run.title: hashlib.sha256(
                b"".join(t.detach().numpy().tobytes() for t in run._tensors().values())
            ).hexdigest()
            for run in runs
        }
        (folder / f"sums{number}.json").write_text(json.dumps(sums))
        return finish(self, runs, *rest)

    Trainer._finish = and_say


def only_the_main_one_writes(number, folder):
    fingerprint_at_the_end(number, folder)
    if number:
        for name in ("write_atomic", "write_folder", "probe", "save_json"):
            setattr(files, name, None)


def at_step(step, number, do):
    def install(me, folder):
        original, done = SAETraining.step, []

        def hooked(self, hidden, token, now, due):
            if me == number and now == step and not done:
                done.append(True)
                hidden = do(hidden)
            original(self, hidden, token, now, due)

        SAETraining.step = hooked

    return install


def terminated(number, folder):
    at_step(5, 1, lambda hidden: (os.kill(os.getpid(), signal.SIGTERM), hidden)[1])(number, folder)


def killed(number, folder):
    at_step(5, 1, lambda hidden: os.kill(os.getpid(), signal.SIGKILL))(number, folder)


def poisoned(number, folder):
    at_step(5, 1, lambda hidden: {site: h * float("nan") for site, h in hidden.items()})(
        number, folder
    )


def short_of_memory(number, folder):
    original = SAETraining._gradients

    def limited(self, hidden, token, whole, first):
        if number == 1 and len(token) / self.parts > 15:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, hidden, token, whole, first)

    SAETraining._gradients, finish = limited, Trainer._finish

    def and_say(self, runs, *rest):
        (folder / f"parts{number}").write_text(str([run.parts for run in runs]))
        return finish(self, runs, *rest)

    Trainer._finish = and_say


def late(number, folder):
    time.sleep(3 * number)


def child(number, world, port, stage, argv, hook, folder):
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "DATA_DIR": str(folder)}
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(
            os.open(folder / f"{stage}{number}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            stream.fileno(),
        )
    torch.set_num_threads(1)
    if hook is not None:
        hook(number, folder)
    sys.exit(
        run_stage(
            stage,
            lambda cfg: {"train": Trainer, "evaluate": Evaluator, "apply": Applier}[stage](
                cfg
            ).run(),
            argv,
        )
    )


def together(server, world, stage, argv, folder, hook=None):
    """Exit codes of `world` processes, and what they said on standard error, error lines alone."""
    folder.mkdir(parents=True, exist_ok=True)
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # as torchrun holds one for its processes
    processes = [
        server.Process(target=child, args=(n, world, store.port, stage, argv, hook, folder))
        for n in range(world)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + 59
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
    hang = [n for n, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    said = [
        line
        for n in range(world)
        for line in (folder / f"{stage}{n}.err").read_text().splitlines()
        if line.startswith(f"{stage}.py:")
    ]
    assert not hang, f"{hang} did not end: {said}"
    return [process.exitcode for process in processes], said


def trained(folder):
    """(weights by title, metrics without what a clock says)"""
    weights = {
        path.stem: torch.load(path, weights_only=True)
        for path in sorted((folder / "SAE_models").glob("*.pt"))
    }
    lines = [json.loads(line) for line in (folder / "runs" / "t" / "metrics.jsonl").open()]
    return weights, [{k: v for k, v in line.items() if "tokens_per_s" not in k} for line in lines]


def furthest(one, two):
    """(largest difference of losses, of other numbers in the lines)"""
    assert [(a["sae"], a["step"], a["tokens"]) for a in one] == [
        (b["sae"], b["step"], b["tokens"]) for b in two
    ]
    assert all(set(a) == set(b) for a, b in zip(one, two, strict=True))
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True))


OPTIONS = [
    "--model",
    *MODELS,
    "--dead_tokens",
    "300",
    "--target_l0",
    "8",
    "--router_objective",
    "advantage",
    "--router_balance",
    "switch",
]


@pytest.fixture(scope="module")
def alone(server, tiny, tmp_path_factory):
    """A training by one process: 25 steps of 5 rows, the last of 1."""
    folder = tmp_path_factory.mktemp("alone")
    codes, said = together(server, 1, "train", arguments(tiny, folder, *OPTIONS), folder)
    assert codes == [0], said
    return folder


def assert_one_in_all(folder, world, alone):
    """The same bits in every process at the end, and at every step the losses of one process alone."""
    sums = [json.loads((folder / f"sums{n}.json").read_text()) for n in range(world)]
    assert len(sums[0]) == len(MODELS) and all(one == sums[0] for one in sums)
    gap = furthest(trained(alone)[1], trained(folder)[1])
    print(f"{world} processes and one: losses differ by up to {gap:.2g}")
    assert gap < 1e-5


def test_two_processes_end_with_the_same_bits_and_the_losses_of_one(server, tiny, tmp_path, alone):
    codes, said = together(
        server, 2, "train", arguments(tiny, tmp_path, *OPTIONS), tmp_path, only_the_main_one_writes
    )
    assert codes == [0, 0], said
    assert any("AuxK" in line for line in trained(alone)[1])
    assert_one_in_all(tmp_path, 2, alone)


def test_a_signal_to_one_process_stops_all_at_the_same_step_and_another_number_of_them_continues(
    server, tiny, tmp_path, alone
):
    argv = arguments(tiny, tmp_path, *OPTIONS)
    codes, said = together(server, 2, "train", argv, tmp_path, terminated)
    assert codes == [143, 143] and len(said) == 1 and "step 6 of 25 is saved" in said[0], said
    codes, said = together(server, 3, "train", argv, tmp_path, only_the_main_one_writes)
    assert codes == [0, 0, 0], said
    assert (
        "continuing at step 6 of 25" in (tmp_path / "train0.out").read_text()
        and not (tmp_path / "train1.out").read_text()
    )
    assert_one_in_all(tmp_path, 3, alone)


def test_a_killed_process_ends_the_job_with_one_line_and_one_process_continues(
    server, tiny, tmp_path, alone
):
    argv = arguments(tiny, tmp_path, *OPTIONS, "--save_every", "2")
    started = time.monotonic()
    codes, said = together(server, 2, "train", argv, tmp_path, killed)
    print(f"from the start to the end of all: {time.monotonic() - started:.1f} s")
    assert codes == [4, -signal.SIGKILL] and len(said) == 1 and "lost another one" in said[0], (
        codes,
        said,
    )
    codes, said = together(server, 1, "train", argv, tmp_path)
    assert codes == [0] and "continuing at step 4 of 25" in (tmp_path / "train0.out").read_text(), (
        said
    )
    assert furthest(trained(alone)[1], trained(tmp_path)[1]) < 1e-5


def test_a_value_in_one_process_that_is_not_finite_stops_the_run_in_all_and_its_whole_batch_is_kept(
    server, tiny, tmp_path
):
    codes, said = together(server, 2, "train", arguments(tiny, tmp_path), tmp_path, poisoned)
    assert (
        codes == [2, 2]
        and len(said) == 1
        and "loss is not finite at step 5 (NormMSE nan" in said[0]
    ), (codes, said)
    dump = json.loads((tmp_path / "runs" / "t" / "nonfinite-TopK_text_t-step5.json").read_text())
    assert len(dump["input_ids"]) == 5


def test_the_process_with_the_least_memory_decides_the_slices_of_all(server, tiny, tmp_path, alone):
    some = [*OPTIONS[1 + len(MODELS) :], "--model", "Gated", "Crosscoder"]
    codes, said = together(
        server, 2, "train", arguments(tiny, tmp_path, *some), tmp_path, short_of_memory
    )
    assert codes == [0, 0], said
    assert [(tmp_path / f"parts{n}").read_text() for n in (0, 1)] == ["[4, 4]", "[4, 4]"]
    losses = {(line["sae"], line["step"]): line["loss"] for line in trained(alone)[1]}
    assert all(
        abs(line["loss"] - losses[line["sae"], line["step"]]) < 1e-5
        for line in trained(tmp_path)[1]
    )


def test_an_error_is_said_once_and_processes_that_come_late_are_waited_for(server, tiny, tmp_path):
    codes, said = together(server, 2, "train", arguments(tiny, tmp_path, "--layer", "9"), tmp_path)
    assert codes == [2, 2] and len(said) == 1 and "layer 9 of a 8-block model" in said[0], said
    codes, said = together(
        server, 2, "train", arguments(tiny, tmp_path, "--max_samples", "5"), tmp_path, late
    )
    assert codes == [0, 0], said


def test_evaluation_and_contexts_of_two_processes_are_those_of_one_to_the_last_digit(
    server, tiny, tmp_path, alone
):
    saes = [
        str(alone / "SAE_models" / f"{name}_text_t.pt")
        for name in ("TopK", "RouteSAE", "BatchTopK", "MLSAE")
    ]
    text = [
        "--data_path",
        str(tiny[1]),
        "--split",
        "all",
        "--batch_size",
        "3",
        "--max_samples",
        "14",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    for world in (1, 2):
        out = tmp_path / str(world)
        codes, said = together(
            server,
            world,
            "evaluate",
            ["--SAE_path", *saes, "--metric", "all", "--output_dir", str(out), *text],
            out,
        )
        assert codes == [0] * world, said
        for title in ("RouteSAE_text_t", "MLSAE_text_t"):
            path = str(alone / "SAE_models" / f"{title}.pt")
            argv = [
                "--SAE_path",
                path,
                "--output_dir",
                str(out),
                "--lines",
                "1",
                "--act_threshold",
                "0",
                "--top_n",
                "3",
                *text,
            ]
            codes, said = together(
                server, world, "apply", argv, out, only_the_main_one_writes if world > 1 else None
            )
            assert codes == [0] * world, said
    found = [
        sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").glob(f"{kind}/*.json"))
        for kind in ("eval", "contexts")
    ]
    assert [len(paths) for paths in found] == [4, 2]
    for path in sum(found, []):
        assert (tmp_path / "1" / path).read_text() == (tmp_path / "2" / path).read_text(), path


# ------------------------------------------------------------------------------------------------- the parts


def test_what_was_on_the_cpu_arrives_there_and_the_rest_on_the_device_asked_for(monkeypatch):
    for name, answer in (("world", 2), ("main", True)):
        monkeypatch.setattr(distributed, name, lambda answer=answer: answer)
    monkeypatch.setattr(
        distributed.dist,
        "gather_object",
        lambda mine, found: found.__setitem__(slice(None), [mine, mine]),
    )
    sent = {
        "window": torch.arange(3),
        "sum": torch.zeros(2, device="meta"),
    }  # as a GPU's, of which there is none here
    (_, arrived), (_, on_cpu) = (
        distributed.to_main(sent, "meta"),
        distributed.to_main({"window": sent["window"]}, "cpu"),
    )
    assert (
        arrived["window"].tolist() == on_cpu["window"].tolist() == [0, 1, 2]
        and arrived["sum"].device.type == "meta"
    )


def test_the_kth_largest_is_found_among_ties_shares_and_too_few_values():
    torch.manual_seed(0)
    values = torch.cat(
        [
            torch.randn(3000),
            torch.full((50,), 1.5),
            torch.rand(100) * 1e-30,
            torch.tensor([float("nan"), float("-inf")]),
        ]
    )
    positive = values[values > 0].sort(descending=True).values
    for k in (1, 7, 250, 300, 1000, len(positive)):
        assert kth_largest(values, k) == positive[k - 1], k
    assert kth_largest(values, len(positive) + 1) == 0
    shares, totals = values.split(1000), []
    for share in shares:  # what one process asks the others for, written down; then answered
        kth_largest(share, 75, lambda x: (totals.append(x), x)[1])
    assert kth_largest(torch.cat(shares), 75 * len(shares)) == positive[75 * len(shares) - 1]


def test_sums_do_not_depend_on_their_order_or_on_who_adds():
    torch.manual_seed(0)
    batches = [(torch.randn(7, 5) * 10.0 ** (i % 9), torch.randn(7, 5)) for i in range(40)]

    def measured(some):
        found = Reconstruction()
        for target, x_hat in some:
            found.update(target, x_hat)
        return found

    whole, parts = measured(batches), [measured(batches[i::3]) for i in range(3)]
    for other in parts[1:]:
        parts[0].merge(other)
    assert parts[0].compute() == whole.compute() == measured(batches[::-1]).compute()


def test_tables_over_parts_of_a_text_hold_what_one_table_over_all_of_it_would():
    torch.manual_seed(0)

    def events(row):
        n = 40
        return Events(
            torch.randint(6, (n,)),
            torch.zeros(n),
            torch.randint(3, (n,)),
            torch.full((n,), row),
            torch.arange(n) // 2,
            torch.arange(n) % 2,
            torch.ones(n),
            torch.randint(5, (n,)).float(),
            torch.zeros(n, 3).half(),  # many equal scores
        )

    def table(some):
        made = Table(6, 9, 2)
        for one in some:
            chosen = made.candidates(one.latent, one.group, one.score)
            made.add(one.take(chosen))
        return made

    rows = [events(row) for row in range(12)]
    whole, parts = table(rows), [table(rows[i::3]) for i in range(3)]
    parts[0].merge([part.kept for part in parts[1:]])
    assert all(torch.equal(a, b) for a, b in zip(whole.kept, parts[0].kept, strict=True))


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_a_fault_read_late_has_changed_nothing_and_names_its_step(optimizer, monkeypatch):
    cfg = parse(
        "train", ["--optimizer", optimizer, "--latent_size", "64", "--k", "4", "--steps", "1"]
    )
    torch.manual_seed(0)
    run = SAETraining(
        build("RouteSAE", 32, 8, {"latent_size": 64, "k": 4}), "x", {}, complete(cfg), 20
    )
    run.mode(True)
    check = run.check
    monkeypatch.setattr(run, "check", lambda: None)  # as on a GPU, between two reports
    for step in range(6):
        hidden = {site: torch.randn(20, 32) for site in run.sae.sites()}
        if step == 3:
            before = [p.clone() for p in run.sae.parameters()]
            hidden[4][7, 5] = float("inf")
        run.step(hidden, torch.arange(20), step, False)
    check()
    assert run.failed_at == 3 and "not finite at step 3" in run.failed
    assert all(torch.equal(a, b) for a, b in zip(before, run.sae.parameters(), strict=True))


def test_signum_makes_the_steps_of_a_schedule_free_mean():
    """Against the three sequences written out: z, their mean x, and y between them."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5), [torch.randn(5) for _ in range(7)]
    p = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer("signum", [p], 0.1, (0.9, 0.999))
    optimizer.train()
    z = x = start
    for k, gradient in enumerate(gradients, 1):
        p.grad = gradient
        optimizer.step()
        z = z - 0.1 * gradient.sign()
        x = x + (z - x) / k
        assert torch.allclose(p, 0.05 * z + 0.95 * x, atol=1e-6)
    optimizer.eval()
    assert torch.allclose(p, x, atol=1e-6)


def test_parts_of_a_batch_add_up_to_its_loss_and_gradient():
    for name in MODELS:
        torch.manual_seed(0)
        sae = build(name, 32, 8, {"latent_size": 64, "k": 4, "auxk_coeff": 0.0})
        hidden = {site: torch.randn(20, 32) for site in sae.sites()}
        if name == "BatchTopK":
            continue  # chooses over the batch: its parts need the other processes

        def gradient(parts, sae=sae, hidden=hidden):
            sae.zero_grad()
            total = 0.0
            for start, stop in parts:
                sae.part_of(20, start)
                terms = sae.loss(
                    sae.autoencode(
                        sae.gather({site: h[start:stop] for site, h in hidden.items()}),
                        token=torch.arange(start, stop),
                    )
                )
                sum(terms.values()).backward()
                total += float(sum(terms.values()).detach())
            return [total, *(p.grad.clone() for p in sae.parameters() if p.grad is not None)]

        whole, parts = gradient([(0, 20)]), gradient([(0, 3), (3, 3), (3, 20)])
        assert whole[0] == pytest.approx(parts[0], abs=1e-6)
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(whole[1:], parts[1:], strict=True)
        ), name


# ------------------------------------------------------------------------------------------------- what starts it


@pytest.fixture
def slurm(tmp_path):
    """Starts the batch script beside an srun that ends as told, or with 143 once it gets SIGTERM; (exit code, commands, output)."""
    root, bin = tmp_path / "checkout", tmp_path / "bin"
    shutil.copytree(files.ROOT / "scripts", root / "scripts")
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "installed").touch()
    bin.mkdir()
    calls = tmp_path / "calls"
    wait = "for i in $(seq ${SECONDS_TO_RUN}0); do sleep .1; done"
    (bin / "srun").write_text(
        f'#!/bin/bash\necho srun "$@" >> {calls}\ntrap "exit 143" TERM\n{wait}\nexit $ENDS\n'
    )
    (bin / "scontrol").write_text(
        f'#!/bin/bash\necho scontrol "$@" >> {calls}\n[ "$1" != show ] || printf "one\\ntwo\\n"\n'
    )
    for command in bin.iterdir():
        command.chmod(0o755)

    def start(ends, seconds=0, number=None):
        calls.unlink(missing_ok=True)
        job = {
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_SUBMIT_DIR": str(root),
        }
        environment = (
            os.environ
            | job
            | {
                "PATH": f"{bin}:{os.environ['PATH']}",
                "ENDS": str(ends),
                "SECONDS_TO_RUN": str(seconds),
            }
        )
        command = ["bash", str(root / "scripts" / "slurm_train.sh"), "--k", "32 64"]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        if number is not None:
            while not calls.exists() or "srun" not in calls.read_text():
                time.sleep(0.05)
            time.sleep(0.3)  # for the trap to be set
            process.send_signal(number)
        said = process.communicate(timeout=50)[0]
        return process.returncode, calls.read_text().splitlines(), said

    return start


def test_the_batch_script_queues_itself_again_after_saving_and_only_then(slurm):
    code, calls, said = slurm(0, 50, signal.SIGUSR1)
    assert code == 0 and calls[-1] == "scontrol requeue 4242" and "queued again" in said
    (started,) = (call for call in calls if call.startswith("srun"))
    assert (
        started.startswith("srun torchrun --nnodes 2 --nproc_per_node 8")
        and "--rdzv_endpoint one:24242 train.py --k 32 64" in started
    )
    for ends, requeued in ((143, True), (0, False), (2, False)):
        code, calls, _ = slurm(ends)
        assert code == (0 if requeued else ends) and ("scontrol requeue 4242" in calls) == requeued


def test_the_commands_of_the_page_are_commands(monkeypatch):
    page = (files.ROOT / "docs" / "several_gpus.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    assert len(blocks) >= 4
    for block in blocks:
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, block
        for stage, options in re.findall(
            r"(train|evaluate|apply)(?:\.py|\.sh)((?: +[^\n#&|]+)?)", block.replace("\\\n", " ")
        ):
            parse(stage, shlex.split(options))
