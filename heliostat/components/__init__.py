"""Ground floor: losses, metrics and layers. Tensors in, tensors out; torch is all they import."""

from typing import TYPE_CHECKING

from heliostat._lazy import lazy_exports

_EXPORTS = {
    "AlignmentProjector": "u_repa",
    "BetaValueTracker": "spo",
    "CORRUPTIONS": "corruptions",
    "CachedContrastiveStep": "contrastive",
    "CachedTextEmbeddings": "text_cache",
    "ClassGaussians": "gaussians",
    "ContrastiveTuningLoss": "proclip",
    "CrossBatchMemory": "cross_batch_memory",
    "DenseFisher": "alignguard_lora",
    "DiagonalFisher": "alignguard_lora",
    "FeatureTap": "u_repa",
    "GroupWhitening": "group_whitening",
    "HessianAccumulator": "two_bit",
    "KroneckerFisher": "alignguard_lora",
    "MultiSimilarityLoss": "multi_similarity",
    "PairLoss": "pair_weighting",
    "RecoveryResult": "alignment_recovery",
    "RestorationLog": "alignment_recovery",
    "ShuffledGroupWhitening": "group_whitening",
    "ShuffledGroupWhiteningHead": "whitened_cse",
    "SmallConvNet": "small_convnet",
    "SoftTokenBank": "softrepa",
    "TestTimeAdapter": "test_time_adaptation",
    "TextAdapter": "proclip",
    "TwoBitLinear": "two_bit",
    "TwoBitWeight": "two_bit",
    "UNPGHead": "unpg",
    "WhitenedInfoNCELoss": "whitened_cse",
    "WhiteningTransform": "group_whitening",
    "alignment": "embedding_geometry",
    "attach_soft_tokens": "softrepa",
    "chunked_forward": "chunking",
    "class_aware_alignment_loss": "cafa",
    "class_gaussians": "gaussians",
    "clipped_policy_loss": "spo",
    "clipped_surrogate_loss": "policy_gradient",
    "configure_batchnorm_adaptation": "test_time_adaptation",
    "corrupt": "corruptions",
    "cross_modal_recall": "retrieval",
    "denoising_contrastive_loss": "softrepa",
    "dequantize_two_bit": "two_bit",
    "drop_pivots": "mc_grpo",
    "dypo_loss": "dypo",
    "eligible_parameters": "alignment_recovery",
    "ema_update_": "proclip",
    "estimate_kronecker_fisher": "alignguard_lora",
    "fit_class_gaussians": "source_statistics",
    "forgetting_factor": "spo",
    "gather_rows": "distributed",
    "geodesic_overlap": "alignguard_lora",
    "grade_groups": "dypo",
    "grao_advantages": "grao",
    "group_alignment_loss": "dypo",
    "group_direct_alignment_loss": "grao",
    "group_relative_advantages": "policy_gradient",
    "group_whiten": "group_whitening",
    "group_whiten_views": "group_whitening",
    "grouped_contrastive_loss": "contrastive",
    "instance_alignment_loss": "proclip",
    "interpolant": "diffusion",
    "kl_estimate": "policy_gradient",
    "lora_fisher_penalty": "alignguard_lora",
    "mahalanobis_sq": "gaussians",
    "make_contrastive_groups": "contrastive",
    "manifold_alignment_loss": "u_repa",
    "margin_logits": "unpg",
    "mean_representation": "alignment_recovery",
    "median_centered_advantages": "mc_grpo",
    "multi_similarity_loss": "multi_similarity",
    "multi_similarity_mine": "multi_similarity",
    "multi_teacher_nll": "dypo",
    "nearest_neighbors": "retrieval",
    "normalize_fisher": "alignguard_lora",
    "pair_loss": "pair_weighting",
    "pair_weights": "pair_weighting",
    "pairwise_denoising_errors": "softrepa",
    "policy_drift": "spo",
    "pool_tokens": "pooling",
    "prepare_two_bit": "two_bit_networks",
    "quantize_model": "two_bit",
    "quantize_two_bit": "two_bit",
    "recover_alignment": "alignment_recovery",
    "representation_inheritance_loss": "proclip",
    "restore_": "alignment_recovery",
    "retrieval_metrics": "retrieval",
    "riemannian_overlap": "alignguard_lora",
    "sample_teachers": "dypo",
    "select_top_gradients": "alignment_recovery",
    "sign_agreement_mask": "alignment_recovery",
    "structure_alignment_loss": "proclip",
    "token_alignment_loss": "u_repa",
    "token_log_probs": "policy_gradient",
    "two_bit_linear": "two_bit",
    "two_bit_network": "two_bit_networks",
    "u_repa_loss": "u_repa",
    "unified_negatives": "unpg",
    "uniformity": "embedding_geometry",
    "unpg_loss": "unpg",
    "weight_fisher_penalty": "alignguard_lora",
    "whiten_advantages": "spo",
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
    from heliostat.components.diffusion import interpolant as interpolant
    from heliostat.components.distributed import gather_rows as gather_rows
    from heliostat.components.dypo import dypo_loss as dypo_loss
    from heliostat.components.dypo import grade_groups as grade_groups
    from heliostat.components.dypo import group_alignment_loss as group_alignment_loss
    from heliostat.components.dypo import multi_teacher_nll as multi_teacher_nll
    from heliostat.components.dypo import sample_teachers as sample_teachers
    from heliostat.components.embedding_geometry import alignment as alignment
    from heliostat.components.embedding_geometry import uniformity as uniformity
    from heliostat.components.gaussians import ClassGaussians as ClassGaussians
    from heliostat.components.gaussians import class_gaussians as class_gaussians
    from heliostat.components.gaussians import mahalanobis_sq as mahalanobis_sq
    from heliostat.components.grao import grao_advantages as grao_advantages
    from heliostat.components.grao import group_direct_alignment_loss as group_direct_alignment_loss
    from heliostat.components.group_whitening import GroupWhitening as GroupWhitening
    from heliostat.components.group_whitening import ShuffledGroupWhitening as ShuffledGroupWhitening
    from heliostat.components.group_whitening import WhiteningTransform as WhiteningTransform
    from heliostat.components.group_whitening import group_whiten as group_whiten
    from heliostat.components.group_whitening import group_whiten_views as group_whiten_views
    from heliostat.components.mc_grpo import drop_pivots as drop_pivots
    from heliostat.components.mc_grpo import median_centered_advantages as median_centered_advantages
    from heliostat.components.multi_similarity import MultiSimilarityLoss as MultiSimilarityLoss
    from heliostat.components.multi_similarity import multi_similarity_loss as multi_similarity_loss
    from heliostat.components.multi_similarity import multi_similarity_mine as multi_similarity_mine
    from heliostat.components.pair_weighting import PairLoss as PairLoss
    from heliostat.components.pair_weighting import pair_loss as pair_loss
    from heliostat.components.pair_weighting import pair_weights as pair_weights
    from heliostat.components.policy_gradient import clipped_surrogate_loss as clipped_surrogate_loss
    from heliostat.components.policy_gradient import group_relative_advantages as group_relative_advantages
    from heliostat.components.policy_gradient import kl_estimate as kl_estimate
    from heliostat.components.policy_gradient import token_log_probs as token_log_probs
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
    from heliostat.components.softrepa import SoftTokenBank as SoftTokenBank
    from heliostat.components.softrepa import attach_soft_tokens as attach_soft_tokens
    from heliostat.components.softrepa import denoising_contrastive_loss as denoising_contrastive_loss
    from heliostat.components.softrepa import pairwise_denoising_errors as pairwise_denoising_errors
    from heliostat.components.source_statistics import fit_class_gaussians as fit_class_gaussians
    from heliostat.components.spo import BetaValueTracker as BetaValueTracker
    from heliostat.components.spo import clipped_policy_loss as clipped_policy_loss
    from heliostat.components.spo import forgetting_factor as forgetting_factor
    from heliostat.components.spo import policy_drift as policy_drift
    from heliostat.components.spo import whiten_advantages as whiten_advantages
    from heliostat.components.test_time_adaptation import TestTimeAdapter as TestTimeAdapter
    from heliostat.components.test_time_adaptation import (
        configure_batchnorm_adaptation as configure_batchnorm_adaptation,
    )
    from heliostat.components.text_cache import CachedTextEmbeddings as CachedTextEmbeddings
    from heliostat.components.two_bit import HessianAccumulator as HessianAccumulator
    from heliostat.components.two_bit import TwoBitLinear as TwoBitLinear
    from heliostat.components.two_bit import TwoBitWeight as TwoBitWeight
    from heliostat.components.two_bit import dequantize_two_bit as dequantize_two_bit
    from heliostat.components.two_bit import quantize_model as quantize_model
    from heliostat.components.two_bit import quantize_two_bit as quantize_two_bit
    from heliostat.components.two_bit import two_bit_linear as two_bit_linear
    from heliostat.components.two_bit_networks import prepare_two_bit as prepare_two_bit
    from heliostat.components.two_bit_networks import two_bit_network as two_bit_network
    from heliostat.components.u_repa import AlignmentProjector as AlignmentProjector
    from heliostat.components.u_repa import FeatureTap as FeatureTap
    from heliostat.components.u_repa import manifold_alignment_loss as manifold_alignment_loss
    from heliostat.components.u_repa import token_alignment_loss as token_alignment_loss
    from heliostat.components.u_repa import u_repa_loss as u_repa_loss
    from heliostat.components.unpg import UNPGHead as UNPGHead
    from heliostat.components.unpg import margin_logits as margin_logits
    from heliostat.components.unpg import unified_negatives as unified_negatives
    from heliostat.components.unpg import unpg_loss as unpg_loss
    from heliostat.components.whitened_cse import ShuffledGroupWhiteningHead as ShuffledGroupWhiteningHead
    from heliostat.components.whitened_cse import WhitenedInfoNCELoss as WhitenedInfoNCELoss
    from heliostat.components.whitened_cse import whitened_infonce_loss as whitened_infonce_loss
