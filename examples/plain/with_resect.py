"""A residual net on scikit-learn's digits, in a plain PyTorch loop."""

import resect
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import timm

digits = load_digits()
images = torch.tensor((digits.images - 8) / 6, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)
train_data, test_data = TensorDataset(images[:1536], labels[:1536]), TensorDataset(images[1536:], labels[1536:])

torch.manual_seed(0)
model = timm.create_model("resnet18", channels=(16, 32, 32, 64), in_chans=1, num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
blocks = resect.find_blocks(model, images[:8])
method = resect.StochasticDepth(model, blocks, drop_prob=0.3, optimizer=optimizer)


def train(epochs):
    """Train, and print the loss and the test accuracy after every epoch."""
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for x, y in DataLoader(train_data, batch_size=64, shuffle=True):
            method.begin_step()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(y)
        print(f"epoch {epoch}: loss {total / len(train_data):.3f}, accuracy {accuracy():.3f}")


@torch.no_grad()
def accuracy():
    """Return the share of the test images that the net names right."""
    model.eval()
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in DataLoader(test_data, batch_size=256))
    return right / len(test_data)


with method:
    train(epochs=3)
