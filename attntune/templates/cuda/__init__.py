"""Schedule templates for CUDA. Which of them ever ran on a GPU, the README's table says."""
