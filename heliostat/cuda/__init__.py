"""CuPy raw kernels: NAME.cu beside NAME.py, which launches it."""
