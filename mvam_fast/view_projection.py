"""A narrower vector for each view, so that the concatenation of many stays affordable."""
from __future__ import annotations

import torch
from torch import Tensor, nn

PROJECTIONS = ("encoder", "shared", "per_view")


class ViewProjection(nn.Module):
    """Views [B,M,E] → [B,M,e], after the encoder's own projection: v_i U_i, or v_i U with one U for all.

    All start as columns of one fixed rotation of E-space, the same in both towers. "per_view": view i takes the i-th e
    columns, going round when they are used up, so that views that all equal one vector g concatenate to g itself,
    rotated, wherever M·e is a multiple of E: a freshly wrapped model with a global view keeps its similarities exactly,
    at CLIP's own width if M·e = E. "shared": the first e columns. A rotation and not the plain coordinates, since
    pretrained encoders have a few coordinates much larger than the others, which one view alone would get.
    """

    def __init__(self, width: int, view_dim: int, num_views: int, projection: str, *, device=None):
        super().__init__()
        matrices = 1 if projection == "shared" else num_views
        random = torch.Generator().manual_seed(0)  # of its own: draws nothing from the generator of the weights
        rotation = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))[0].float()
        columns = torch.arange(matrices * view_dim).remainder(width)
        start = rotation[:, columns].unflatten(1, (matrices, view_dim)).transpose(0, 1)
        self.weight = nn.Parameter(start.to(device).contiguous())  # [M,E,e], or [1,E,e]

    def forward(self, views: Tensor) -> Tensor:
        weight = self.weight.to(views.dtype)  # autocast apart: it may be of higher precision than the encoder
        if len(weight) == 1:
            return views @ weight[0]
        return (views.transpose(0, 1) @ weight).transpose(0, 1)

    def keep(self, views: list[int]) -> None:
        """Drops the matrices of all other views."""
        if len(self.weight) > 1:
            self.weight = nn.Parameter(self.weight.detach()[views].clone())

    def extra_repr(self) -> str:
        return f"matrices={len(self.weight)}, width={self.weight.shape[1]}, view_dim={self.weight.shape[2]}"


def resolve(
    projection: str | None, view_dim: int | None, max_width: int | None, num_views: int, global_view: bool, width: int
) -> tuple[str, int]:
    """(projection, width of one view) of arguments that may be None; `width`: E of the encoder's own projection."""
    if projection not in (None, *PROJECTIONS):
        raise ValueError(f"projection is {projection!r}; it must be None or one of {', '.join(PROJECTIONS)}")
    if view_dim is not None and view_dim < 1:
        raise ValueError(f"view_dim is {view_dim}; it must be at least 1")
    if max_width is not None:
        own = width * global_view
        if view_dim is not None:
            if own + num_views * view_dim > max_width:
                raise ValueError(
                    f"max_width is {max_width}, but {num_views} views of view_dim {view_dim}"
                    f"{f' and the global view of {own}' if own else ''} are {own + num_views * view_dim} numbers"
                )
        elif own + num_views * width > max_width:
            view_dim = (max_width - own) // num_views
            if view_dim < 1:
                raise ValueError(
                    f"max_width is {max_width}, too little for {num_views} views"
                    f"{f' beside the global view of {own}' if own else ''}; it must be at least {own + num_views}"
                )
    if projection is None:
        projection = "encoder" if view_dim is None else "per_view"
    if projection == "encoder" and view_dim not in (None, width):
        raise ValueError(
            f"view_dim is {view_dim}, but projection 'encoder' leaves views at the encoder's width {width}; "
            "it must be 'shared' or 'per_view'"
        )
    return projection, view_dim or width
