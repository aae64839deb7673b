"""The demo's feature network: a small MNIST classifier that stands in for Inception."""

import torch.nn as nn
import torch.nn.functional as F


class FeatureNet(nn.Module):
    """Classifier whose pooled features, mid-level map and logits score the demo's samples."""

    def __init__(self, in_channels, width, num_classes):
        super().__init__()
        plan = [(in_channels, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        plan += [(2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=s, padding=1, bias=False) for i, o, s in plan
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in plan)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        """x (N, C, H, W) in [-1, 1] -> pooled (N, 4 width), spatial (N, h * w * 7), logits."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i == 3:
                spatial = x[:, :7].flatten(1)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, self.fc(pooled)
