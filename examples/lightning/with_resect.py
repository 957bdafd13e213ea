"""A small ViT on scikit-learn's digits, with Lightning."""

import resect
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import lightning
import timm

digits = load_digits()
images = torch.tensor((digits.images - 8) / 6, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)


class Classifier(lightning.LightningModule):
    """A classifier of the digits."""

    def __init__(self):
        super().__init__()
        size = {"img_size": 8, "patch_size": 2, "embed_dim": 48, "depth": 4, "num_heads": 4}
        self.net = timm.create_model("vit_tiny_patch16_224", **size, in_chans=1, num_classes=10)

    def training_step(self, batch, number):
        """Return the loss of a batch."""
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, number):
        """Note the accuracy on a batch."""
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def on_train_epoch_end(self):
        """Print what was noted."""
        found = self.trainer.callback_metrics
        print(f"epoch {self.current_epoch}: loss {found['loss']:.3f}, accuracy {found['accuracy']:.3f}")

    def configure_optimizers(self):
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)


lightning.seed_everything(0)
classifier = Classifier()
blocks = resect.find_blocks(classifier.net, images[:8])
method = resect.EffectivePaths(classifier.net, blocks, keep=6)
train_loader = DataLoader(TensorDataset(images[:1536], labels[:1536]), batch_size=32, shuffle=True)
test_loader = DataLoader(TensorDataset(images[1536:], labels[1536:]), batch_size=256)
trainer = lightning.Trainer(
    max_epochs=4,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    logger=False,
    callbacks=[resect.integrations.lightning.callback(method)],
    enable_progress_bar=False,
)
trainer.fit(classifier, train_loader, test_loader)
