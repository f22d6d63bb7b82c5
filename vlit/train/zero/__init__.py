"""DeepSpeed ZeRO as a training engine: optimizer states, gradients and weights spread over the ranks."""
