"""One small training, run by each engine: a net of seven blocks, ten optimizer steps of two micro-batches each.

Every function trains from scratch, or from the checkpoint that the same engine wrote after five steps, and returns
the net and its method. All of them read the same batches in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resect

EPOCHS, STEPS, MICRO, SIZE = 2, 5, 2, 8  # steps per epoch are odd: ResidualDroppath is between its two phases


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = (
            nn.Linear(3, 6),
            nn.Sequential(*[Layer() for _ in range(7)]),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)))


METHODS = {
    "StochasticDepth": lambda net, blocks: resect.StochasticDepth(net, blocks, rule="uniform"),
    "ResidualDroppath": lambda net, blocks: resect.ResidualDroppath(net, blocks, rule="uniform"),
    "EpsilonGate": lambda net, blocks: resect.EpsilonGate(
        net, blocks, epsilon=0.7, side=0.1, skip_muted_after=3, muted_at_start="allow"
    ),
}


def data() -> torch.utils.data.TensorDataset:
    generator, count = torch.Generator().manual_seed(1), STEPS * MICRO * SIZE
    return torch.utils.data.TensorDataset(
        torch.randn(count, 3, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    )


def loader() -> Any:
    return torch.utils.data.DataLoader(data(), batch_size=SIZE)


def made(name: str) -> tuple[Net, resect.train.method.Method, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    method = METHODS[name](net, resect.find_blocks(net, torch.randn(8, 3)))
    parameters = [*net.parameters(), *method.parameters()]
    return net, method, torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def plain(name: str, folder: Path, resume: bool, clip: float | None = None) -> Any:
    net, method, optimizer = made(name)
    first = 0
    with method:
        if resume:
            saved = torch.load(folder / "checkpoint.pt", weights_only=True)
            for part, state in zip((net, optimizer, method), saved["parts"], strict=True):
                part.load_state_dict(state)
            first = saved["epoch"]
        for epoch in range(first, EPOCHS):
            for number, (x, y) in enumerate(loader()):
                if number % MICRO == 0:
                    method.begin_step()
                loss = F.cross_entropy(net(x), y) + method.extra_loss(y)
                (loss / MICRO).backward()
                if number % MICRO == MICRO - 1:
                    if clip:
                        nn.utils.clip_grad_norm_(net.parameters(), clip)
                    optimizer.step()
                    optimizer.zero_grad()
            if epoch == 0 and not resume:
                parts = [part.state_dict() for part in (net, optimizer, method)]
                torch.save({"parts": parts, "epoch": 1}, folder / "checkpoint.pt")
    return net, method


def timm(name: str, folder: Path, resume: bool) -> Any:
    """As timm's train.py: its scaler, its averaged model, its saver."""
    from timm.models import resume_checkpoint
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

    net, method, optimizer = made(name)
    ema, scaler = ModelEmaV3(net, decay=0.9), NativeScaler(device="cpu")
    folder.mkdir(exist_ok=True)
    saver = CheckpointSaver(net, optimizer, model_ema=ema, amp_scaler=scaler, checkpoint_dir=str(folder))
    first, updates = 0, 0
    with method:
        if resume:
            first = resume_checkpoint(net, str(folder / "checkpoint-0.pth.tar"), optimizer, scaler, log_info=False)
            method.load_state_dict(torch.load(folder / "method-0.pt", weights_only=True))
        for epoch in range(first, EPOCHS):
            for number, (x, y) in enumerate(loader()):
                need_update = number % MICRO == MICRO - 1
                if number % MICRO == 0:
                    method.begin_step()
                loss = (F.cross_entropy(net(x), y) + method.extra_loss(y)) / MICRO
                scaler(loss, optimizer, parameters=net.parameters(), need_update=need_update)
                if need_update:
                    optimizer.zero_grad()
                    updates += 1
                    ema.update(net, step=updates)
            if not resume:
                torch.save(method.state_dict(), folder / f"method-{epoch}.pt")
                saver.save_checkpoint(epoch)
    return net, method


def accelerate(name: str, folder: Path, resume: bool) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=MICRO, cpu=True)
    net, method, optimizer = made(name)
    model, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    method.optimizer = optimizer  # as accelerate wraps it
    accelerator.register_for_checkpointing(method)
    with method:
        if resume:
            accelerator.load_state(str(folder))
        for epoch in range(1 if resume else 0, EPOCHS):
            for x, y in batches:
                if accelerator.sync_gradients:
                    method.begin_step()
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(x), y) + method.extra_loss(y))
                    optimizer.step()
                    optimizer.zero_grad()
            if epoch == 0:
                accelerator.save_state(str(folder))
    return net, method


class ForTrainer(nn.Module):
    """The net as transformers' Trainer calls it."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Any = None) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


def summed(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(output["logits"], labels, reduction="sum") / num_items_in_batch


def trainer(net: Net, method: Any, optimizer: Any, folder: Path, **options: Any) -> Any:
    import transformers as hf

    ours = [resect.integrations.transformers.callback(method)] if method else []
    defaults = {
        "per_device_train_batch_size": SIZE, "gradient_accumulation_steps": MICRO, "max_grad_norm": 0.0,
        "num_train_epochs": EPOCHS, "save_steps": 5, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in data()]
    return hf.Trainer(
        ForTrainer(net), hf.TrainingArguments(output_dir=str(folder), **defaults | options), train_dataset=rows,
        eval_dataset=rows, optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        compute_loss_func=method.wrap(summed) if method else summed, callbacks=ours,
    )  # fmt: skip


def transformers(name: str, folder: Path, resume: int, **options: Any) -> Any:
    """``resume``: the step whose checkpoint to go on from."""
    net, method, optimizer = made(name)
    step = 5 if resume is True else resume
    with method:
        trainer(net, method, optimizer, folder, **options).train(str(folder / f"checkpoint-{step}") if resume else None)
    return net, method


def module(package: str, net: Net, method: Any, optimizer: Any, **hooks: Any) -> Any:
    import importlib

    pl = importlib.import_module(package)

    def training_step(self: Any, batch: Any, number: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1]) + (method.extra_loss(batch[1]) if method else 0.0)

    parts = {"training_step": training_step, "configure_optimizers": lambda self: optimizer, **hooks}
    made = type("Module", (pl.LightningModule,), parts)()
    made.net = net
    return made


def fitter(package: str, method: Any, folder: Path, **options: Any) -> Any:
    import importlib

    pl, parts = importlib.import_module(package), importlib.import_module(f"{package}.callbacks")
    checkpoints = parts.ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
    ours = [resect.integrations.lightning.callback(method)] if method else []
    defaults = {
        "max_epochs": EPOCHS, "accumulate_grad_batches": MICRO, "accelerator": "cpu", "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    return pl.Trainer(callbacks=[checkpoints, *ours], **defaults | options)


def lightning(name: str, folder: Path, resume: bool, package: str = "lightning.pytorch", **options: Any) -> Any:
    net, method, optimizer = made(name)
    checkpoint = folder / "step=5.ckpt" if resume else None
    fitter(package, method, folder, **options).fit(
        module(package, net, method, optimizer), loader(), ckpt_path=checkpoint
    )
    return net, method


ENGINES = {"plain": plain, "timm": timm, "accelerate": accelerate, "transformers": transformers, "lightning": lightning}
