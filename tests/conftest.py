"""One thread for everybody: the same sums in the same order on every machine, and no two tests fighting for cores."""

import torch

torch.set_num_threads(1)
