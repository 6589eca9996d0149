"""Evaluation of pretrained and fine-tuned families."""
