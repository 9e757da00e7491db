"""DreamLLM's steps done as the original program does them, on the stock modules of transformers and diffusers.

It is what dreamllm is compared with, so it holds the same weights and computes the same losses, gradients, tokens and
pictures (tests/benchmarks), and keeps the original's ways of getting there. By the numbers of the list of
inefficiencies (section H of the specification):

| # | what | where it is kept |
|---|---|---|
| 3 | Python loops over rows and pictures that cut and concatenate embeddings | model.splice, model.dream_contexts |
| 4 | CLIP runs on a blank picture when there is none, in every decoding step too | model.image_features |
| 5, 18 | float32 logits of all positions, cross-entropy of each, then those with labels | training.language_loss |
| 6 | host reads of losses and of the gradient norm in every step | training.Trainer.step |
| 7 | two passes per prompt, with logits, and all hidden states of the second | drawing.dream_states |
| 7, 25 | the empty prompt again for every row and call | drawing.draw_pixels |
| 9 | the frozen VAE encodes the same pictures again in every step | training.diffusion_loss |
| 10 | the UNet's activations of all pictures of a step are held together | training.diffusion_loss |
| 11 | doubled latents; keys and values of the constant condition in every step | drawing.denoise |
| 12 | a scheduler in Python | drawing.denoise |
| 16 | padding to the longest document | collate |
| 22 | queries copied for every row | model.splice |
| 26 | the VAE decodes the whole batch at once; pictures become PIL at the end | drawing.draw |
| - | activation checkpointing of every decoder layer (section D.2) | training.Trainer |

Left out, because they say nothing about a CPU or would only slow the original down: FlashAttention's unpadding (2; here
torch's scaled_dot_product_attention with the padding mask), loading (14, 17, 19, 21), evaluation by single questions
(20), and bfloat16 weights without float32 masters (27).
"""

from benchmarks.original_pattern.collate import PaddedBatch, pad_batch
from benchmarks.original_pattern.drawing import draw
from benchmarks.original_pattern.model import OriginalPattern
from benchmarks.original_pattern.training import Trainer
from benchmarks.original_pattern.writing import write

__all__ = ["OriginalPattern", "PaddedBatch", "Trainer", "draw", "pad_batch", "write"]
