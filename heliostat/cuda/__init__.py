"""CuPy raw kernels: NAME.cu beside NAME.py, which registers its torch operator."""
