"""The device: every tensor lies on it, and what a GPU does differs from a CPU by rounding alone.

The first part runs anywhere: "cuda" tensors without values tell their device and shape. The second
needs a GPU: python -m pytest -q -s tests/test_device.py
"""

import copy
import dataclasses
import functools
import gc
import json
import os
import signal

import commands
import pytest
import torch
import torch.distributed as dist
from commands import same
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import model
import train

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
REPORT = ["--recipe", "report"]
STRONG = ["--recipe", "strong", "--cutmix", "1", "--repeats", "2"]  # all of it in each step


def trainer_on(device: str, *flags, folder, cache, mode=None) -> train.Trainer:
    """Return the trainer that train.py makes; once the images are read, `mode` begins."""
    where = ["--data", str(folder), "--cache", str(cache), "--batch-size", "8"]
    args, _ = train.parse([*where, *flags])
    store = data.ImageStore(args.data, args.cache)
    rows = store.rows(data.split(store, args.seed)["train"])
    if mode:
        mode.__enter__()
        store.pixels, store.labels, rows = map(mode.from_tensor, (store.pixels, store.labels, rows))
    compute = train.set_up(device, args.precision)
    store.move_to(compute.device)
    network = train.initial_network(args, store, rows, {})
    return train.Trainer(args, store, rows, compute, network)


def first_batch(trainer: train.Trainer, images: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and labels of the epoch's first step."""
    rows, changes = trainer.epoch_plan()
    return trainer.inputs(rows[:images], {name: c[:images] for name, c in changes.items()})


# --------------------------------------------------------------------- anywhere: without values


def move(module, device, memory_format=torch.preserve_format):
    """Do what `Module.to` does, which cannot exchange parameters without values."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            layout = memory_format if parameter.dim() == 4 else torch.preserve_format
            moved = parameter.detach().to(device, memory_format=layout)
            part._parameters[name] = torch.nn.Parameter(moved)
    return module


def give_gradients(loss, *_):
    """Do what `Tensor.backward` does, but for the arithmetic, which needs a driver."""
    nodes, seen = [loss.grad_fn], {None}
    while nodes:
        if (node := nodes.pop()) not in seen:
            seen.add(node)
            nodes += [other for other, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.empty_like(node.variable)


def record(loss, kept):
    """Do what `make_graphed_callables` does to outputs: all of them require a gradient.

    A number on the CPU would be recorded as it is.
    """
    if {tensor.device for tensor in kept} != {GPU}:
        raise RuntimeError("a tensor is on another device")
    return lambda *batch: tuple(output.requires_grad_() for output in loss(*batch))


@pytest.fixture
def pretend(monkeypatch, photos, cache):
    """A function that returns a trainer on a GPU that need not exist: its tensors have no values.

    An operation on tensors of two devices, or one that reads a value, raises.
    """
    if not torch.cuda.is_available() and TORCH < (2, 11):
        pytest.skip("older versions of PyTorch ask a driver to index tensors without values")
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(torch.Tensor, "backward", give_gradients)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "cov", lambda tensor: tensor @ tensor.T)  # it reads values
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    clear = data.mean_std.cache_clear
    clear()
    mode = FakeTensorMode()

    def make(*flags, resident: bool = True, capability: tuple = (8, 0)) -> train.Trainer:
        memory = 80e9 if resident else 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, memory))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return trainer_on("cuda", *flags, folder=photos, cache=cache, mode=mode)

    yield make
    mode.__exit__(None, None, None)
    clear()  # those in it have no values


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("recipe", [REPORT, STRONG], ids=["report", "strong"])
def test_everything_is_on_the_device(pretend, recipe, resident):
    trainer = pretend(*recipe, resident=resident)
    store, home = trainer.store, GPU if resident else CPU
    assert {store.pixels.device, store.labels.device} == {home}
    rows, changes = trainer.epoch_plan()
    assert rows.device == home
    assert {change.device for change in changes.values()} <= {GPU}
    inputs, labels, images = next(trainer.batches())
    assert (inputs.device, inputs.dtype, labels.device) == (GPU, torch.float32, GPU)
    assert len(inputs) == len(labels) == images == 8
    trainer.training_loss.train()
    trainer.train_step(inputs, labels, images)
    assert not trainer.sums.requires_grad
    kept = [*trainer.network.parameters(), *(p.grad for p in trainer.network.parameters())]
    kept += trainer.averaged.parameters() if trainer.averaged else []
    for state in trainer.optimizer.state.values():
        kept += state.values()
    kept += [trainer.sums, trainer.training_loss.adjustment]
    assert {tensor.device for tensor in kept} == {GPU}
    rows = torch.empty(20, dtype=torch.int64)
    for flip in (False, True):
        logits = train.evaluate(trainer.evaluated, store, rows, 64, trainer.compute, flip)
        assert (logits.device, logits.dtype) == (CPU, torch.float32)
        assert logits.shape == (20, 10)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)], ids=str
)
def test_precision_is_what_the_gpu_is_built_for(pretend, capability, dtype):
    trainer = pretend("--stride", "4", "--train-size", "64", capability=capability)
    seen = []
    trainer.network.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    trainer.train_step(*first_batch(trainer), 8)
    assert trainer.compute.dtype == dtype
    assert seen == [dtype]
    assert trainer.scaler.is_enabled() == (dtype is torch.float16)
    assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}


def leave_changes(trainer, monkeypatch):
    rows, changes = trainer.epoch_plan()
    changes = {name: change.to(CPU) for name, change in changes.items()}
    monkeypatch.setattr(trainer, "epoch_plan", lambda: (rows, changes))


def leave_rows(trainer, monkeypatch):
    monkeypatch.setattr(trainer.store, "pixels", trainer.store.pixels.to(CPU))


def leave_mean(trainer, monkeypatch):
    monkeypatch.setattr(data, "mean_std", lambda device: (torch.zeros(1, 3, 1, 1),) * 2)


def leave_labels(trainer, monkeypatch):
    inputs, labels = trainer.inputs, torch.zeros(8, dtype=torch.int64)
    monkeypatch.setattr(trainer, "inputs", lambda *batch: (inputs(*batch)[0], labels))


def leave_sums(trainer, monkeypatch):
    trainer.sums = torch.zeros(3)


def leave_prior(trainer, monkeypatch):
    trainer.training_loss.adjustment = torch.zeros(10)


def leave_network(trainer, monkeypatch):
    move(trainer.network, CPU)


@pytest.mark.parametrize(
    "leave",
    [leave_changes, leave_rows, leave_mean, leave_labels, leave_sums, leave_prior, leave_network],
)
def test_a_tensor_left_on_the_cpu_would_be_found(pretend, monkeypatch, leave):
    trainer = pretend(*STRONG)
    leave(trainer, monkeypatch)
    with pytest.raises(RuntimeError, match=r"device|type"):
        trainer.train_step(*first_batch(trainer), 8)


def test_a_value_that_a_step_reads_would_be_found(pretend, monkeypatch):
    trainer = pretend()
    monkeypatch.setattr(torch, "full_like", lambda tensor, value: tensor + tensor.item())
    with pytest.raises(DataDependentOutputException):
        trainer.train_step(*first_batch(trainer), 8)


# ------------------------------------------------------------------------------------ on a GPU


class Several(int):
    """A number that counts as more than 1, so that one process does what several do."""

    def __gt__(self, other):
        return True


def join_group() -> None:
    """Let the process train by DDP and NCCL, as the only one of its group."""
    set_up, ddp = train.set_up, train.DistributedDataParallel

    def set_up_group(*args, **options):
        group = f"file://{os.getcwd()}/group"
        compute = set_up(*args, **options)
        dist.init_process_group("cpu:gloo,cuda:nccl", init_method=group, rank=0, world_size=1)
        return dataclasses.replace(compute, world_size=Several(1))

    def announce(*args, **options):
        print("DDP over", dist.get_backend_config())
        return ddp(*args, **options)

    train.set_up, train.DistributedDataParallel = set_up_group, announce


def ask_for_too_much() -> None:
    """Let the first step ask for a petabyte."""
    train.Trainer.train_step = lambda *_: torch.empty(2**50, dtype=torch.uint8, device="cuda")


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory) -> dict[str, commands.Command]:
    """Runs on the GPU, at once because most of their time is that of starting."""
    exact = [*STRONG, "--epochs", 2, "--precision", "fp16", "--deterministic"]
    terminate = functools.partial(commands.after_step, 19, commands.send, signal.SIGTERM)
    plans = {
        "plain": (["--epochs", 3], None, 0),
        "whole": (exact, None, 0),
        "broken": (exact, terminate, 128 + signal.SIGTERM),
        "grouped": (exact, join_group, 0),
        "exhausted": ([], ask_for_too_much, 1),
    }
    started = {}
    for name, (more, before, _) in plans.items():
        argv = [*flags, "--device", "cuda", "--name", "run", *more]
        folder = tmp_path_factory.mktemp(name)
        started[name] = commands.Command("train", *argv, folder=folder, before=before)
    for name, (_, _, status) in plans.items():
        assert started[name].wait() == status, started[name].stderr
    return started


def state(command: commands.Command) -> dict:
    """Return the checkpoint for --resume that a run has left."""
    return model.load(command.folder / "run.last.pth")


@cuda
def test_a_run_learns(runs):
    history = state(runs["plain"])["history"]
    dtype = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    assert f"{dtype} on {torch.cuda.get_device_name()}" in runs["plain"].stdout
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert "Warning" not in runs["plain"].stderr


@cuda
def test_a_run_interrupted_in_an_epoch_is_resumed_bit_by_bit(runs):
    whole, broken = state(runs["whole"]), state(runs["broken"])
    assert (broken["epoch"], broken["step"]) == (1, 3)
    commands.run("train", "--resume", "--ckpt", "run.pth", folder=runs["broken"].folder)
    resumed = state(runs["broken"])
    names = ("state_dict", "averaged", "optimizer", "scaler", "epoch", "step")
    assert [name for name in names if not same(whole[name], resumed[name])] == []
    for first, second in zip(whole["history"], resumed["history"], strict=True):
        times = {"seconds": 0, "images_per_second": 0}
        assert first | times == second | times
    first, second = (model.load(runs[name].folder / "run.pth") for name in ("whole", "broken"))
    assert same(first["state_dict"], second["state_dict"])


@cuda
def test_ddp_over_nccl_trains_the_same(runs):
    assert "cuda:nccl" in runs["grouped"].stdout
    whole, grouped = state(runs["whole"]), state(runs["grouped"])
    for first, second in zip(whole["history"], grouped["history"], strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=0.01)
    for name, weight in whole["state_dict"].items():
        assert (weight - grouped["state_dict"][name]).norm() <= 0.01 * weight.norm(), name


@cuda
def test_out_of_memory_ends_as_one_line(runs):
    assert "out of memory; try half the --batch-size" in commands.one_line(runs["exhausted"])


@cuda
def test_a_checkpoint_is_tested_alike_on_cpu_and_gpu(runs):
    folder, started = runs["plain"].folder, []
    for device in ("cpu", "cuda"):
        argv = f"--ckpt run.pth --split train --precision fp32 --device {device}".split()
        argv += ["--json", f"{device}.json"]
        started.append(commands.Command("test", *argv, folder=folder))
    for command in started:
        assert command.wait() == 0, command.stderr
    cpu, gpu = (json.loads((folder / f"{name}.json").read_text()) for name in ("cpu", "cuda"))
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=0.01)
    assert gpu["accuracy"] == pytest.approx(cpu["accuracy"], abs=100 / cpu["images"] + 1e-3)


@cuda
def test_fp16_grows_its_scale_and_skips_a_step_that_overflows(photos, cache, monkeypatch):
    monkeypatch.setattr(model, "HIDDEN", 64)
    trainer = trainer_on("cuda", *STRONG, "--precision", "fp16", folder=photos, cache=cache)
    batch = first_batch(trainer)
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=2)
    for _ in range(2):
        trainer.train_step(*batch, 8)
    assert trainer.scaler.get_scale() == 16
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.train_step(*batch, 8)
    assert trainer.scaler.get_scale() == 2.0**39
    assert same(before, trainer.network.state_dict())
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    trainer.train_step(*batch, 8)
    assert not same(before, trainer.network.state_dict())
    assert trainer.sums.isfinite().all()


@cuda
def test_a_graph_computes_what_the_network_does(photos, cache, monkeypatch):
    argv = [*STRONG, *["--precision", "fp32", "--stride", "4", "--train-size", "64-80"]]
    recorded, plain = (trainer_on("cuda", *argv, folder=photos, cache=cache) for _ in range(2))
    monkeypatch.setattr(plain, "graphed", lambda batch: plain.training_loss)
    for epoch, images in ((0, 8), (0, 8), (0, 5), (0, 8), (29, 8)):  # 29 has larger images
        plain.network.load_state_dict(recorded.network.state_dict())  # or rounding would add up
        for trainer in (recorded, plain):
            trainer.training_loss.train()
            trainer.epoch = epoch
            inputs, labels, _ = next(trainer.batches())  # others in each step
            trainer.train_step(inputs[:images], labels[:images], images)
        assert recorded.graphs
        # loss and images; a hit more or less may be rounding
        torch.testing.assert_close(recorded.sums[::2], plain.sums[::2], rtol=0.02, atol=0)
        for one, other in zip(
            recorded.network.parameters(), plain.network.parameters(), strict=True
        ):
            assert (one.grad - other.grad).norm() <= 0.02 * other.grad.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_a_process_may_have_no_image_of_a_batch(photos, cache, monkeypatch, device):
    monkeypatch.setattr(model, "HIDDEN", 64)
    trainer = trainer_on(device, *STRONG, folder=photos, cache=cache)
    before = copy.deepcopy(trainer.network.state_dict())
    inputs, labels = first_batch(trainer, images=0)
    assert inputs.shape == (0, 3, 80, 80)
    trainer.train_step(inputs, labels, 8)  # DDP adds the gradients of the others
    assert trainer.sums.tolist() == [0, 0, 0]
    for name, weight in trainer.network.state_dict().items():  # nothing but weight decay
        torch.testing.assert_close(weight, before[name], rtol=0.01, atol=0)


@cuda
def test_streamed_images_are_those_on_the_gpu(photos, cache, monkeypatch):
    monkeypatch.setattr(model, "HIDDEN", 64)
    resident = trainer_on("cuda", *STRONG, folder=photos, cache=cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    streamed = trainer_on("cuda", *STRONG, folder=photos, cache=cache)
    assert (resident.store.pixels.device, streamed.store.pixels.device) == (GPU, CPU)
    for first, second in zip(first_batch(resident), first_batch(streamed), strict=True):
        assert first.device == second.device == GPU
        assert torch.equal(first, second)


@cuda
@pytest.mark.parametrize(
    ("recipe", "precision", "resident"),
    [(REPORT, "auto", True), (STRONG, "auto", True), (STRONG, "auto", False),
     (STRONG, "fp16", True)],
    ids=["report", "strong", "streamed", "fp16"],
)  # fmt: skip
def test_a_step_makes_the_cpu_wait_for_no_gpu(
    photos, cache, monkeypatch, recipe, precision, resident
):
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    trainer = trainer_on("cuda", *recipe, "--precision", precision, folder=photos, cache=cache)
    monkeypatch.setattr(train, "TOGETHER", {"cuda": 16})
    trainer.training_loss.train()
    batches = trainer.batches()
    for _ in range(2):  # the first ones choose algorithms and make constants
        trainer.train_step(*next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):  # the first and the third augment two batches
            trainer.train_step(*next(batches))
        with pytest.raises(RuntimeError, match="synchronizing"):
            trainer.sums.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
def test_memory_of_a_step(photos, cache):
    gc.collect()  # the trainers of other tests
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    flags = ["--batch-size", "64", "--repeats", "8"]  # 8 steps, of which 4 are augmented at once
    trainer = trainer_on("cuda", *flags, folder=photos, cache=cache)
    trainer.training_loss.train()
    batches = trainer.batches()
    trainer.train_step(*next(batches))
    torch.cuda.empty_cache()  # it has tried algorithms out
    torch.cuda.reset_peak_memory_stats()
    for inputs, labels, _ in batches:
        trainer.train_step(inputs, labels, 64)
    trainer.train_step(inputs[:30], labels[:30], 30)  # goes without the graph
    torch.cuda.synchronize()
    # a graph's memory does not count as allocated
    peak = (torch.cuda.max_memory_reserved() - before) / 1e9
    print(f"\nsteps on 64 images of 224 pixels need {peak:.2f} GB")
    assert peak < 3.5
