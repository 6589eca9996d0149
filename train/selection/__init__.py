"""Selection of the kernels of a run: verification on its device, a race of whole steps, and the verdict."""
