"""A small ViT on scikit-learn's digits, the way timm's train.py does it: optimizer, schedule, EMA, AMP, mixup."""

import argparse

import resect
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch.utils.data import DataLoader, TensorDataset

import timm

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--output", default=".")
parser.add_argument("--resume", default="")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

digits = load_digits()
images = torch.tensor((digits.images - 8) / 6, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1536], labels[:1536]), batch_size=64, shuffle=True, drop_last=True)

torch.manual_seed(0)
size = {"img_size": 8, "patch_size": 2, "embed_dim": 48, "depth": 4, "num_heads": 4, "in_chans": 1, "num_classes": 10}
model = timm.create_model("vit_tiny_patch16_224", **size).to(device)
optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=args.epochs, updates_per_epoch=len(loader))
mixup = Mixup(mixup_alpha=0.2, num_classes=10)
loss_fn = SoftTargetCrossEntropy()
loss_scaler = NativeScaler(device=device)
model_ema = ModelEmaV3(model, decay=0.9)
blocks = resect.find_blocks(model, images[:8])
method = resect.StochasticDepth(model, blocks, drop_prob=0.3).attach()
saver = CheckpointSaver(model, optimizer, model_ema=model_ema, amp_scaler=loss_scaler, checkpoint_dir=args.output)
start_epoch = 0
if args.resume:
    start_epoch = resume_checkpoint(model, args.resume, optimizer, loss_scaler)
    load_checkpoint(model_ema.module, args.resume, use_ema=True)
    scheduler.step_update(start_epoch * len(loader))
    method.load_state_dict(torch.load(f"{args.output}/method-{start_epoch - 1}.pt"))


def train_one_epoch(epoch):
    """Train for one epoch and return the mean loss."""
    model.train()
    total = 0.0
    for number, (x, y) in enumerate(loader, start=epoch * len(loader)):
        method.begin_step()
        x, y = mixup(x.to(device), y.to(device))
        with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
            loss = loss_fn(model(x), y)
        loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        optimizer.zero_grad()
        model_ema.update(model, step=number + 1)
        scheduler.step_update(number + 1)
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def validate(net):
    """Return the share of the test images that the net names right."""
    guess = net.eval()(images[1536:].to(device)).argmax(1).cpu()
    return (guess == labels[1536:]).float().mean().item()


for epoch in range(start_epoch, args.epochs):
    loss = train_one_epoch(epoch)
    print(f"epoch {epoch}: loss {loss:.3f}, accuracy {validate(model):.3f}, averaged {validate(model_ema.module):.3f}")
    saver.save_checkpoint(epoch)
    torch.save(method.state_dict(), f"{args.output}/method-{epoch}.pt")
