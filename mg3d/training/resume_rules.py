"""Which keys may change when a run is resumed: one table for pre-training and fine-tuning. No heavy import."""

from __future__ import annotations

__all__ = ["APPLIED", "DECIDES_SPLIT", "DECISIVE", "OVERRULED", "why_refused"]

APPLIED = frozenset(
    # where, how far and with what the run goes on
    "exp_name run_name log_dir default_root_dir data_root image_root work_dir tokenizer max_epoch max_steps test_only "
    "fast_dev_run log_every_n_steps num_threads num_workers deterministic gradient_checkpointing num_gpus devices "
    "num_nodes verify_crc on_bad_sample max_bad_fraction max_bad_steps checkpoint_every_n_steps save_top_k "
    "val_check_interval val_every_epochs resume_from resume resume_weights_only resume_allow load_partial "
    "allow_partial phantom phantom_seed full_check "
    # what is made of the trained weights
    "stages evaluate eval_split eval_bootstrap eval_findings eval_prompt_positive eval_prompt_negative "
    "eval_probe_cases clm_num_beams clm_do_sample clm_empty_report clm_findings clm_meteor sw_batch_size tta "
    "ensemble predict bootstrap_rounds pictures".split()
)
"""Applied, and said in a line: the remaining steps are the same ones, up to rounding. Data are compared by digest."""

OVERRULED: dict[str, str] = {
    **dict.fromkeys(
        ("learning_rate", "lr_multiplier_head", "lr_multiplier_multi_modal", "learning_rate_crops"),
        "the state of the schedule keeps its rates",
    ),
    "weight_decay": "the state of the optimizer keeps its decay",
    **dict.fromkeys(("load_path", "weights", "scratch"), "the weights of the checkpoint take their place"),
}
"""Would mean nothing, because the checkpoint has the last word -> why. Refused."""

DECISIVE = frozenset(
    # the order and the content of batches
    "seed datasets data_frac data_fraction batch_size per_gpu_batchsize accumulate train_transform_keys "
    "val_transform_keys image_size draw_false_image image_only fixed_draws vocab_size max_text_len sent_level "
    "fragment_separator whole_word_masking mlm_prob wwm_budget fold num_folds shuffle_labels cache axis_order augment "
    "roi crops_per_volume positive negative protocol "
    # the model
    "vision_encoder vision_encoder_options vision_encoder_size patch_merging patch_size input_image_embed_size "
    "input_text_embed_size hidden_size num_top_layer fusion_variant drop_rate freeze_text_encoder text_encoder_eval "
    "text_encoder_random_init legacy_unused_modules mlp_ratio encoder feature_size decoder mode freeze "
    "knn_neighbours knn_temperature "
    # the objective
    "loss_names mim_mask_ratio mim_window mim_mask_mode mim_fusion sal_weight sal_detach_target image_feature_reuse "
    "itc_detach_sentences cl_temp ssm_positive_threshold ssm_negative_threshold contrastive_gather itc_embed_dim "
    "itc_text_source same_report_pairs memory_queue memory_queue_size vision_only freeze_image_encoder "
    "cache_image_tokens clm_standardise clm_max_text_len "
    # the optimisation, and the metric that chooses the best weights
    "optim_type optimizer decay_power end_lr warmup_steps warmup_epochs schedule schedule_interval layer_decay "
    "grad_clip precision overlap blending".split()
)
"""Would make another run of it. Refused, like every key that stands in none of the three."""

DECIDES_SPLIT = ("seed", "fold", "num_folds")
"""What must not change even where a checkpoint is only scored: its training cases would be among the scored ones."""


def why_refused(key: str) -> str:
    """Why a key (``a`` or ``a.b``) cannot change on resuming."""
    return OVERRULED.get(key.partition(".")[0], "the rest of the run would be another one")
