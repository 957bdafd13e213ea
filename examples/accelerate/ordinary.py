"""A residual net on scikit-learn's digits, with accelerate: gradient accumulation, and a checkpoint every epoch."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import timm
from accelerate import Accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--resume", default="", help="a checkpoint's folder: checkpoint-1")
args = parser.parse_args()

digits = load_digits()
images = torch.tensor((digits.images - 8) / 6, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=32, shuffle=True)

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
model = timm.create_model("resnet18", channels=(16, 32, 32, 64), in_chans=1, num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
first = 0
if args.resume:
    accelerator.load_state(args.resume)
    first = int(args.resume.rpartition("-")[2]) + 1

for epoch in range(first, args.epochs):
    model.train()
    total = 0.0
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
    model.eval()
    with torch.no_grad():
        guess = model(images[1500:].to(accelerator.device)).argmax(1).cpu()
    accuracy = (guess == labels[1500:]).float().mean()
    accelerator.print(f"epoch {epoch}: loss {total / len(loader):.3f}, accuracy {accuracy:.3f}")
    accelerator.save_state(f"checkpoint-{epoch}")
