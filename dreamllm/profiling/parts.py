"""Which part of the model an operator belongs to, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dreamllm.model import DreamLLM
from dreamllm.profiling.operators import tensors_in

PARTS = ("CLIP", "LLM", "loss", "VAE", "UNet", "joints", "optimiser")
"""In the order of a step. "joints": projectors, queries, and what lies between the parts. "loss": the language model's
head, the noise, and both losses. "optimiser": clipping too."""

_METHODS = {"forward_packed": "joints", "_lm_loss": "loss", "_vm_loss": "loss", "prepare_condition": "UNet"}
"""Methods of the model that are no modules, and the part to which what they do themselves belongs."""


class PartTracker:
    """While entered, `part` and `phase` ("forward", "backward", "update") say where `model`'s training step is.

    Forward, the modules tell; backward, every node of the graph is marked with the part in which it was made.
    `on_change(part, phase)` is called when either changes.
    """

    def __init__(self, model: DreamLLM, on_change: Callable[[str, str], None] | None = None) -> None:
        self.model, self.on_change = model, on_change
        self.part, self.phase = "optimiser", "update"
        self._inside: list[str] = []
        self._marked: dict[Any, RemovableHandle] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> PartTracker:
        for part, modules in self._modules().items():
            for module in modules:
                begin = partial(self._begin_module, part)
                self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                self._handles.append(module.register_forward_hook(lambda _, a, out, part=part: self._end(part, out)))
        for name, part in _METHODS.items():
            setattr(self.model, name, self._tracked(getattr(self.model, name), part))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for name in _METHODS:
            delattr(self.model, name)  # the instance's; the class's own is there again
        self._forget()

    def _modules(self) -> dict[str, list[nn.Module]]:
        model = self.model
        vae = [getattr(model.vae, name) for name in ("encoder", "quant_conv") if hasattr(model.vae, name)]
        return {
            "LLM": [model.decoder, model.get_input_embeddings()],
            "loss": [model.get_output_embeddings()],
            "CLIP": [model.vision_model],
            "VAE": [module for module in vae if module is not None],
            "UNet": [model.unet],
            "joints": [model.visual_projector, model.condition_projector],
        }

    def now(self) -> tuple[str, str]:
        """The part and the phase of what runs now."""
        if self.phase != "backward" and torch._C._current_graph_task_id() != -1:
            self._backward("loss")  # before the first marked node
        return self.part, self.phase

    # -- forward ---------------------------------------------------------------------------------------------------

    def _tracked(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def tracked(*args: Any, **kwargs: Any) -> Any:
            self._begin(part, (args, kwargs))
            output = method(*args, **kwargs)
            self._end(part, output)
            return output

        return tracked

    def _begin_module(self, part: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._begin(part, (args, kwargs))

    def _begin(self, part: str, inputs: Any) -> None:
        if self._inside:
            self._mark(inputs, self._inside[-1])  # what was made before belongs to what surrounds this
        self._inside.append(part)
        self._move(part, "forward")

    def _end(self, part: str, output: Any) -> None:
        self._mark(output, part)
        self._inside.pop()
        if self._inside:
            self._move(self._inside[-1], "forward")
        else:
            self._move("optimiser", "update")

    # -- backward --------------------------------------------------------------------------------------------------

    def _mark(self, output: Any, part: str) -> None:
        """Marks the nodes behind `output` that have no mark yet."""
        queue = [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]
        while queue:
            node = queue.pop()
            if node in self._marked or node.name() == "torch::autograd::AccumulateGrad":
                continue
            self._marked[node] = node.register_prehook(lambda _: self._backward(part))
            queue.extend(following for following, _ in node.next_functions if following is not None)

    def _backward(self, part: str) -> None:
        if self.phase != "backward":
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)
        self._move(part, "backward")

    def _after_backward(self) -> None:
        if self._inside:  # the UNet's, within the forward pass of the whole
            self._move(self._inside[-1], "forward")
            return
        self._forget()
        self._move("optimiser", "update")

    def _forget(self) -> None:
        self._marked.clear()

    def _move(self, part: str, phase: str) -> None:
        if (part, phase) != (self.part, self.phase):
            self.part, self.phase = part, phase
            if self.on_change is not None:
                self.on_change(part, phase)
