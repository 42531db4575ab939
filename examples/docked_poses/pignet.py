"""PIGNet2, pretrained: binding energies of docked poses in kcal/mol.

The network sums pairwise energies (van der Waals, hydrogen bonds, metals, hydrophobic contacts)
between a ligand and its pocket, with the wells learned from atom environments.

References:
    Moon et al., "PIGNet2", arXiv:2307.01066. Weights: MIT-licensed package `pignet2`.
"""

from importlib.resources import as_file, files

import torch
from pignet2.data import complex_to_data
from pignet2.models import PIGNetMorse
from rdkit import Chem
from torch import Tensor, nn
from torch_geometric.data import Data

__all__ = ["binding_energy", "graph", "pretrained"]

_CONVOLUTION_RANGE = (0.5, 5.0)  # Å, what every shipped checkpoint was trained with
# Å. The checkpoints say 999, every pair of a ligand and a pocket atom. For TYK2 the pairs beyond 10
# are a third of them, add 0.04 kcal/mol to a pose's energy at most, and cost a seventh of the time.
_INTERACTION_RANGE = (0.5, 10.0)
_TENSORS = (
    *("x", "pos", "edge_index", "edge_index_c", "vdw_radii", "rotor"),
    *("is_ligand", "is_metal", "is_h_donor", "is_h_acceptor", "is_hydrophobic"),
)


class _NoDeviation(nn.Module):
    """Stands in for a head whose output the network multiplies by zero."""

    def forward(self, pairs: Tensor) -> Tensor:
        return pairs.new_zeros(len(pairs))


def pretrained(checkpoint: int = 0) -> PIGNetMorse:
    """PIGNet2 with one of its four sets of weights, in evaluation mode.

    Args:
        checkpoint: 0 to 3, the members of the published ensemble.
    """
    with as_file(files("pignet2") / "ckpt" / f"pda_{checkpoint}.pt") as path:
        # Not weights_only: the file holds an OmegaConf object. It comes from the installed
        # package, whose code runs here anyway.
        saved = torch.load(path, map_location="cpu", weights_only=False)
    config = saved["config"]
    config.model.interaction_range = list(_INTERACTION_RANGE)
    model = PIGNetMorse(config, saved["in_features"])
    model.load_state_dict(saved["model_state_dict"])
    if config.model.dev_vdw_radii_coeff == 0.0:
        model.nn_dvdw = _NoDeviation()  # the same numbers, a quarter of the time less
    # Evaluation mode in training too: dropout on a dozen ligands is mostly noise.
    return model.eval()


def graph(ligand: Chem.Mol, pocket: Chem.Mol) -> Data:
    """One pose as the graph PIGNet2 takes: heavy atoms, ligand first, then the pocket."""
    full = complex_to_data(ligand, pocket, conv_range=_CONVOLUTION_RANGE)
    data = Data(**{name: full[name] for name in _TENSORS})  # no molecules: they do not collate
    data.batch = torch.zeros(len(data.x), dtype=torch.long)  # [atoms], a batch of one
    return data


def binding_energy(model: nn.Module, poses: Data) -> Tensor:
    """Predicted binding free energies `[c]` of the c poses in a graph or a batch of graphs."""
    energies, _ = model(poses)  # [c, kinds]
    total: Tensor = energies.sum(dim=-1)
    return total
