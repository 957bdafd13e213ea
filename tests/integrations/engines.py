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
        self.stem, self.layers, self.head = nn.Linear(3, 6), nn.Sequential(*[Layer() for _ in range(7)]), nn.Linear(6, 3)

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
    generator = torch.Generator().manual_seed(1)
    count = STEPS * MICRO * SIZE
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


def transformers(name: str, folder: Path, resume: bool, **options: Any) -> Any:
    import transformers as hf

    net, method, optimizer = made(name)
    arguments = hf.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=SIZE, gradient_accumulation_steps=MICRO, max_grad_norm=0.0,
        num_train_epochs=EPOCHS, save_steps=5, report_to="none", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer = hf.Trainer(
        ForTrainer(net), arguments, train_dataset=[{"x": x, "labels": y} for x, y in data()],
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        compute_loss_func=method.wrap(summed), callbacks=[resect.integrations.transformers.callback(method)],
    )  # fmt: skip
    with method:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5") if resume else None)
    return net, method


def lightning(name: str, folder: Path, resume: bool, package: str = "lightning.pytorch", **options: Any) -> Any:
    import importlib

    pl = importlib.import_module(package)
    net, method, optimizer = made(name)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, number: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1]) + method.extra_loss(batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer

    checkpoints = importlib.import_module(f"{package}.callbacks").ModelCheckpoint(
        folder, filename="{step}", every_n_epochs=1, save_top_k=-1
    )
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=MICRO, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
        callbacks=[checkpoints, resect.integrations.lightning.callback(method)], **options,
    )  # fmt: skip
    trainer.fit(Module(), loader(), ckpt_path=folder / "step=5.ckpt" if resume else None)
    return net, method


ENGINES = {"plain": plain, "accelerate": accelerate, "transformers": transformers, "lightning": lightning}
