"""Ground floor: losses, metrics and layers. Tensors in, tensors out; torch is all they import."""

from typing import TYPE_CHECKING

from heliostat._lazy import lazy_exports

_EXPORTS = {
    "CORRUPTIONS": "corruptions",
    "CachedContrastiveStep": "contrastive",
    "CachedTextEmbeddings": "text_cache",
    "ClassGaussians": "gaussians",
    "ContrastiveTuningLoss": "proclip",
    "CrossBatchMemory": "cross_batch_memory",
    "DenseFisher": "alignguard_lora",
    "DiagonalFisher": "alignguard_lora",
    "GroupWhitening": "group_whitening",
    "KroneckerFisher": "alignguard_lora",
    "MultiSimilarityLoss": "multi_similarity",
    "PairLoss": "pair_weighting",
    "RecoveryResult": "alignment_recovery",
    "RestorationLog": "alignment_recovery",
    "ShuffledGroupWhitening": "group_whitening",
    "ShuffledGroupWhiteningHead": "whitened_cse",
    "SmallConvNet": "small_convnet",
    "TestTimeAdapter": "test_time_adaptation",
    "TextAdapter": "proclip",
    "UNPGHead": "unpg",
    "WhitenedInfoNCELoss": "whitened_cse",
    "WhiteningTransform": "group_whitening",
    "alignment": "embedding_geometry",
    "chunked_forward": "chunking",
    "class_aware_alignment_loss": "cafa",
    "class_gaussians": "gaussians",
    "configure_batchnorm_adaptation": "test_time_adaptation",
    "corrupt": "corruptions",
    "cross_modal_recall": "retrieval",
    "eligible_parameters": "alignment_recovery",
    "ema_update_": "proclip",
    "estimate_kronecker_fisher": "alignguard_lora",
    "fit_class_gaussians": "source_statistics",
    "gather_rows": "distributed",
    "geodesic_overlap": "alignguard_lora",
    "group_whiten": "group_whitening",
    "group_whiten_views": "group_whitening",
    "grouped_contrastive_loss": "contrastive",
    "instance_alignment_loss": "proclip",
    "lora_fisher_penalty": "alignguard_lora",
    "mahalanobis_sq": "gaussians",
    "make_contrastive_groups": "contrastive",
    "margin_logits": "unpg",
    "mean_representation": "alignment_recovery",
    "multi_similarity_loss": "multi_similarity",
    "multi_similarity_mine": "multi_similarity",
    "nearest_neighbors": "retrieval",
    "normalize_fisher": "alignguard_lora",
    "pair_loss": "pair_weighting",
    "pair_weights": "pair_weighting",
    "pool_tokens": "pooling",
    "recover_alignment": "alignment_recovery",
    "representation_inheritance_loss": "proclip",
    "restore_": "alignment_recovery",
    "retrieval_metrics": "retrieval",
    "riemannian_overlap": "alignguard_lora",
    "select_top_gradients": "alignment_recovery",
    "sign_agreement_mask": "alignment_recovery",
    "structure_alignment_loss": "proclip",
    "unified_negatives": "unpg",
    "uniformity": "embedding_geometry",
    "unpg_loss": "unpg",
    "weight_fisher_penalty": "alignguard_lora",
    "whitened_infonce_loss": "whitened_cse",
}
__all__ = [*_EXPORTS]
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from heliostat.components.alignguard_lora import DenseFisher as DenseFisher
    from heliostat.components.alignguard_lora import DiagonalFisher as DiagonalFisher
    from heliostat.components.alignguard_lora import KroneckerFisher as KroneckerFisher
    from heliostat.components.alignguard_lora import estimate_kronecker_fisher as estimate_kronecker_fisher
    from heliostat.components.alignguard_lora import geodesic_overlap as geodesic_overlap
    from heliostat.components.alignguard_lora import lora_fisher_penalty as lora_fisher_penalty
    from heliostat.components.alignguard_lora import normalize_fisher as normalize_fisher
    from heliostat.components.alignguard_lora import riemannian_overlap as riemannian_overlap
    from heliostat.components.alignguard_lora import weight_fisher_penalty as weight_fisher_penalty
    from heliostat.components.alignment_recovery import RecoveryResult as RecoveryResult
    from heliostat.components.alignment_recovery import RestorationLog as RestorationLog
    from heliostat.components.alignment_recovery import eligible_parameters as eligible_parameters
    from heliostat.components.alignment_recovery import mean_representation as mean_representation
    from heliostat.components.alignment_recovery import recover_alignment as recover_alignment
    from heliostat.components.alignment_recovery import restore_ as restore_
    from heliostat.components.alignment_recovery import select_top_gradients as select_top_gradients
    from heliostat.components.alignment_recovery import sign_agreement_mask as sign_agreement_mask
    from heliostat.components.cafa import class_aware_alignment_loss as class_aware_alignment_loss
    from heliostat.components.chunking import chunked_forward as chunked_forward
    from heliostat.components.contrastive import CachedContrastiveStep as CachedContrastiveStep
    from heliostat.components.contrastive import grouped_contrastive_loss as grouped_contrastive_loss
    from heliostat.components.contrastive import make_contrastive_groups as make_contrastive_groups
    from heliostat.components.corruptions import CORRUPTIONS as CORRUPTIONS
    from heliostat.components.corruptions import corrupt as corrupt
    from heliostat.components.cross_batch_memory import CrossBatchMemory as CrossBatchMemory
    from heliostat.components.distributed import gather_rows as gather_rows
    from heliostat.components.embedding_geometry import alignment as alignment
    from heliostat.components.embedding_geometry import uniformity as uniformity
    from heliostat.components.gaussians import ClassGaussians as ClassGaussians
    from heliostat.components.gaussians import class_gaussians as class_gaussians
    from heliostat.components.gaussians import mahalanobis_sq as mahalanobis_sq
    from heliostat.components.group_whitening import GroupWhitening as GroupWhitening
    from heliostat.components.group_whitening import ShuffledGroupWhitening as ShuffledGroupWhitening
    from heliostat.components.group_whitening import WhiteningTransform as WhiteningTransform
    from heliostat.components.group_whitening import group_whiten as group_whiten
    from heliostat.components.group_whitening import group_whiten_views as group_whiten_views
    from heliostat.components.multi_similarity import MultiSimilarityLoss as MultiSimilarityLoss
    from heliostat.components.multi_similarity import multi_similarity_loss as multi_similarity_loss
    from heliostat.components.multi_similarity import multi_similarity_mine as multi_similarity_mine
    from heliostat.components.pair_weighting import PairLoss as PairLoss
    from heliostat.components.pair_weighting import pair_loss as pair_loss
    from heliostat.components.pair_weighting import pair_weights as pair_weights
    from heliostat.components.pooling import pool_tokens as pool_tokens
    from heliostat.components.proclip import ContrastiveTuningLoss as ContrastiveTuningLoss
    from heliostat.components.proclip import TextAdapter as TextAdapter
    from heliostat.components.proclip import ema_update_ as ema_update_
    from heliostat.components.proclip import instance_alignment_loss as instance_alignment_loss
    from heliostat.components.proclip import representation_inheritance_loss as representation_inheritance_loss
    from heliostat.components.proclip import structure_alignment_loss as structure_alignment_loss
    from heliostat.components.retrieval import cross_modal_recall as cross_modal_recall
    from heliostat.components.retrieval import nearest_neighbors as nearest_neighbors
    from heliostat.components.retrieval import retrieval_metrics as retrieval_metrics
    from heliostat.components.small_convnet import SmallConvNet as SmallConvNet
    from heliostat.components.source_statistics import fit_class_gaussians as fit_class_gaussians
    from heliostat.components.test_time_adaptation import TestTimeAdapter as TestTimeAdapter
    from heliostat.components.test_time_adaptation import (
        configure_batchnorm_adaptation as configure_batchnorm_adaptation,
    )
    from heliostat.components.text_cache import CachedTextEmbeddings as CachedTextEmbeddings
    from heliostat.components.unpg import UNPGHead as UNPGHead
    from heliostat.components.unpg import margin_logits as margin_logits
    from heliostat.components.unpg import unified_negatives as unified_negatives
    from heliostat.components.unpg import unpg_loss as unpg_loss
    from heliostat.components.whitened_cse import ShuffledGroupWhiteningHead as ShuffledGroupWhiteningHead
    from heliostat.components.whitened_cse import WhitenedInfoNCELoss as WhitenedInfoNCELoss
    from heliostat.components.whitened_cse import whitened_infonce_loss as whitened_infonce_loss
