"""One function per family of recorded values: it feeds stored inputs to shipped modules and hands the results back.

Adapters do no arithmetic of their own; sizes, seeds and settings come from the entry.
"""

from __future__ import annotations

FAMILIES: dict[str, str] = {
    "relative_position_index": "encoders:relative_position_index",
    "swin": "encoders:swin",
    "swin_l": "encoders:swin_l",
    "unet3d_genesis": "encoders:unet",
    "unet3d_pcrlv2": "encoders:unet_pcrlv2",
    "attn_mlm_cross_mean": "modules:mlm_cross",
    "attn_mlm_cross_unet": "modules:mlm_cross",
    "attn_mlm_cross_ctrate": "modules:mlm_cross",
    "attn_mim_cross_mean": "modules:mim_cross",
    "attn_mim_cross_unet": "modules:mim_cross",
    "attn_mim_cross_ctrate": "modules:mim_cross",
    "attn_unidir": "modules:unidirectional",
    "sentence_attention_pool": "modules:sentence_attention_pool",
    "sentence_gather": "modules:sentence_gathering",
    "pooler": "modules:pooler",
    "swin_pooler": "modules:swin_pooler",
    "swin_att_pooler": "modules:swin_att_pooler",
    "sentence_pooler": "modules:sentence_pooler",
    "sen_mlm_head": "heads:sentence_mlm",
    "mim_head_vae": "heads:masked_image",
    "itc_head": "heads:image_text",
    "itc_head_single": "heads:image_text",
    "itm_head": "heads:matching",
    "itc_gather_two_ranks": "ranks:gathered_contrast",
    "loss_local_itc": "losses:local_contrast",
    "loss_ssm": "losses:sentence_similarity",
    "loss_sen_mlm": "losses:sentence_mlm",
    "loss_mim": "losses:masked_image",
    "mask_rand_patch": "schedules:cell_masks",
    "lr_schedule": "schedules:learning_rates",
    "memory_queues": "queues:memory_queues",
    "text_prepro_ctrg": "text:report_preparation",
    "text_split_into_sents": "text:sentence_splitting",
    "text_sentence_index": "text:sentence_index",
    "collate_tensors": "text:collation",
    "whole_word_mask": "text:whole_word_masking",
    "image_ctrg": "images:ctrg",
    "image_ct_rate": "images:ct_rate",
    "ct_rate_nifti_to_npz": "images:ct_rate_offline",
    "pretraining_step": "pretraining:pretraining_step",
}
"""Family -> "module:function" below this package."""
