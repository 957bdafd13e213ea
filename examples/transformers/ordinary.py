"""A small ViT on scikit-learn's digits, with transformers' Trainer."""

import torch
from sklearn.datasets import load_digits

from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

digits = load_digits()
images = torch.tensor((digits.images - 8) / 6, dtype=torch.float32)[:, None]
rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, digits.target, strict=True)]

set_seed(0)
config = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, num_labels=10,
    hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
)  # fmt: skip
model = ViTForImageClassification(config)
arguments = TrainingArguments(
    output_dir="runs",
    num_train_epochs=4,
    per_device_train_batch_size=32,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    logging_strategy="epoch",
    eval_strategy="epoch",
    save_strategy="epoch",
    report_to="none",
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=rows[:1536],
    eval_dataset=rows[1536:],
    compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
)
trainer.train()
