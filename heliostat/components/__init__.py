"""Ground floor: losses, metrics and layers. Tensors in, tensors out; torch is all they import."""

from typing import TYPE_CHECKING

from heliostat._lazy import lazy_exports

_EXPORTS = {
    "GroupWhitening": "group_whitening",
    "ShuffledGroupWhitening": "group_whitening",
    "ShuffledGroupWhiteningHead": "whitened_cse",
    "WhitenedInfoNCELoss": "whitened_cse",
    "WhiteningTransform": "group_whitening",
    "alignment": "embedding_geometry",
    "chunked_forward": "chunking",
    "gather_rows": "distributed",
    "group_whiten": "group_whitening",
    "group_whiten_views": "group_whitening",
    "pool_tokens": "pooling",
    "uniformity": "embedding_geometry",
    "whitened_infonce_loss": "whitened_cse",
}
__all__ = [*_EXPORTS]
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from heliostat.components.chunking import chunked_forward as chunked_forward
    from heliostat.components.distributed import gather_rows as gather_rows
    from heliostat.components.embedding_geometry import alignment as alignment
    from heliostat.components.embedding_geometry import uniformity as uniformity
    from heliostat.components.group_whitening import GroupWhitening as GroupWhitening
    from heliostat.components.group_whitening import ShuffledGroupWhitening as ShuffledGroupWhitening
    from heliostat.components.group_whitening import WhiteningTransform as WhiteningTransform
    from heliostat.components.group_whitening import group_whiten as group_whiten
    from heliostat.components.group_whitening import group_whiten_views as group_whiten_views
    from heliostat.components.pooling import pool_tokens as pool_tokens
    from heliostat.components.whitened_cse import ShuffledGroupWhiteningHead as ShuffledGroupWhiteningHead
    from heliostat.components.whitened_cse import WhitenedInfoNCELoss as WhitenedInfoNCELoss
    from heliostat.components.whitened_cse import whitened_infonce_loss as whitened_infonce_loss
