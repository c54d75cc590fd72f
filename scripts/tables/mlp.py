"""A multilayer perceptron with ReLU, as the published tables have it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class MLPConfig(PretrainedConfig):
    """`sizes` of the input and of each hidden layer."""

    model_type = "mlp"

    def __init__(self, sizes: Sequence[int] = (784, 400, 400), **others: Any) -> None:
        self.sizes = list(sizes)
        super().__init__(**others)


class MLPForImageClassification(PreTrainedModel):
    """Hidden layers with ReLU and one linear head; PyTorch's own first weights."""

    config_class = MLPConfig

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        for before, after in zip(config.sizes, config.sizes[1:], strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.sizes[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave them as PyTorch makes them."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        logits = self.classifier(self.body(pixel_values.flatten(1)))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def mlp(*sizes: int, num_labels: int = 10) -> MLPForImageClassification:
    return MLPForImageClassification(MLPConfig(sizes, num_labels=num_labels))
