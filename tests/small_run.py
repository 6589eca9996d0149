"""Options of a pretraining that takes seconds."""

SMALL_RUN = {
    "recipe": "paper",
    "network": "resnet",
    "dns": "c8-d1111,c8-d1121,c16-d2121",
    "stem": "small",
    "image_size": 12,
    "hidden_features": 16,
    "out_features": 8,
    "epochs": 2,
    "batch_size": 8,
    "subnets_per_step": 3,
    "base_lr": 4.0,
    "warmup_epochs": 0.5,
    "workers": 0,
    "probe_epochs": 1,
    "probe_images": 20,
    "log_steps": 1,
}
