"""Notes on the blocks of orchmoe.py for the annotated page, docs/annotated.html.

The page shows the docstring of a block from orchmoe.py itself. Here is the rest: the equation, who
says so, and the test that pins it. Grades are those of docs/paper.md: stated (the paper's
abstract), secondary (summaries of the paper), inferred (from the papers it builds on), chosen
(ours). Blocks without a grade are plain engineering.

Equations are in the notation of docs/annotate.py: "X^hat" has a hat, "B_s" an index, "X^T" a T.
"""

from typing import NamedTuple


class Note(NamedTuple):
    text: str = ""  # what the docstring does not say
    equation: str = ""
    grade: str = ""  # stated, secondary, inferred, chosen
    source: str = ""  # of the grade
    test: str = ""  # name of the test


NOTES = {
    "module": Note(
        text=(
            "The eight equations are the whole method. The colours at the left say for each "
            "part who says so: the full text of the paper was not available to us."
        ),
        grade="stated",
        source=("the abstract states the two modules, that no task ids are used, and the data set"),
    ),
    "imports": Note(
        text=("Only torch and the standard library, so that this one file can be copied."),
    ),
    "OrchMoEConfig": Note(
        text=(
            "K, S, R, the adapted Linears and all defaults are chosen: no source that we "
            "could read gives numbers."
        ),
        grade="chosen",
    ),
    "OrchMoEConfig.__post_init__": Note(
        text="Mistakes are found here and not after hours of training.",
        test="test_a_config_with_an_impossible_value_is_refused",
    ),
    "Routing": Note(
        text=("A token router computes c inside each Linear, so w and c are None there."),
    ),
    "TaskRouter": Note(
        text=(
            "The paper's Automatic Task Classification module. One router serves the whole model."
        ),
        grade="inferred",
        source=("one router for the model, on the source; the other reading is --router token"),
    ),
    "TaskRouter.__init__": Note(
        text="w = W_task x_hat + b needs K (D + 1) parameters, and no others.",
        test="test_the_initial_bias_gives_uniform_w_for_zero_x_hat",
    ),
    "TaskRouter.summarise": Note(
        text=(
            "Nothing is learned here. After rmsnorm a token's product with itself is D, far "
            "above that with other tokens. So a token attends to itself and its repetitions, "
            "X_hat is nearly 2 X, and standardising undoes the factor."
        ),
        equation="X^hat = softmax(X X^T / sqrt(D)) X + X ;; x^hat = mean_L X^hat",
        grade="secondary",
        source=(
            "the attention without parameters; the rmsnorm and the mean over tokens are chosen"
        ),
        test="test_w_is_the_formula_in_numpy",
    ),
    "TaskRouter.forward": Note(
        text="Routing is per sample, soft, and normalised by a softmax.",
        equation="w = softmax(W_task (x^hat - μ) / σ + b)",
        grade="secondary",
        source=("w(X) = W_Task X_hat + Bias; the softmax is inferred, the standardising is chosen"),
        test="test_w_is_the_formula_in_numpy",
    ),
    "TaskRouter.fit": Note(
        text="With normal initial values w would hardly depend on the sample.",
        equation="H(softmax(λ C x^hat)) = ln(K) / 3",
        grade="chosen",
        test="test_the_kmeans_start_tells_clusters_apart_without_labels",
    ),
    "TaskRouter._check_shapes": Note(
        text="Token ids instead of embeddings are the most common mistake.",
        test="test_a_source_of_another_shape_is_refused_with_the_given_shape",
    ),
    "masked_mean": Note(
        text="The mean over real tokens only.",
        equation="x^hat = sum_l m_l X^hat_l / sum_l m_l",
        test="test_junk_in_the_padding_changes_nothing",
    ),
    "spherical_kmeans": Note(
        text=("It finds the abstract tasks: clusters of training sources, without labels."),
        equation="C_k = normalise(sum_i x_i)",
        grade="chosen",
        test="test_kmeans_centres_are_those_of_the_clusters",
    ),
    "scale_for_entropy": Note(
        text="It sets how sharp w is at the start.",
        grade="chosen",
    ),
    "mix_skills": Note(
        text=(
            "This is the specification. kernels.mix_skills computes the same faster, and "
            "tests compare the outputs and all gradients of both."
        ),
        equation="y = W_0 x + α / R sum_s c_s B_s A_s x",
        grade="secondary",
        source="Eq. 3 as summarised: outputs are mixed, not factors",
        test="test_mix_skills_equals_its_slow_twin",
    ),
    "SkillLinear": Note(
        text=(
            "Changing the class keeps the object: a saved reference, a hook or a name still "
            "finds it."
        ),
        test="test_attach_keeps_the_module_the_weight_and_the_class",
    ),
    "SkillLinear.skill_parameters": Note(),
    "SkillLinear.forward": Note(
        text="Where the base is a plain Linear, one function computes both parts.",
        equation="y = W_0 x + α / R sum_s c_s B_s A_s x",
        grade="secondary",
        source="skills are LoRA modules, outputs are mixed",
        test="test_linear_is_the_equation_written_out",
    ),
    "SkillLinear.skill_c": Note(
        text="Only a token router computes here: w of each token times Zhat.",
        equation="c = w Z^hat",
        grade="inferred",
        test="test_token_router_with_identity_allocation_is_moe_lora",
    ),
    "SkillLinear._base_trains": Note(
        text=(
            "With --method full, or a Linear of your own that trains, W0 needs a gradient, "
            "which the fused function does not compute."
        ),
        test="test_a_weight_that_trains_gets_its_gradient",
    ),
    "SkillLinear._apply": Note(
        text="In bfloat16 the small updates of AdamW would be lost.",
        test="test_a_change_of_dtype_leaves_the_adapters_in_float32",
    ),
    "SkillLinear.__reduce_ex__": Note(
        test="test_a_deepcopy_shares_nothing_with_its_original",
    ),
    "class_with_skills": Note(
        test="test_a_compiled_model_is_one_graph_without_breaks",
    ),
    "_new_skill_linear": Note(),
    "at_least_float32": Note(),
    "full_precision": Note(
        test="test_under_autocast_routing_stays_float32",
    ),
    "add_skills": Note(
        text="The scale rule makes c = 1/S exactly one LoRA of rank S R.",
        equation="A ~ U(-1 / sqrt(D), 1 / sqrt(D)) ;; B = 0",
        grade="inferred",
        source="as LoRA starts (Hu et al. 2021); the scale rule is chosen",
        test="test_equal_weights_are_the_matched_lora",
    ),
    "Adapters": Note(
        text=("The baselines derive from this class too, so all methods have one interface."),
    ),
    "Adapters.__init__": Note(
        text=(
            "The skills are registered in the base, under the names of their Linears. So "
            "model.parameters() has them, and an optimiser finds them."
        ),
    ),
    "Adapters.module": Note(),
    "Adapters.route": Note(),
    "Adapters.fit_router": Note(
        text="One pass over some hundred training sources.",
        grade="chosen",
        test="test_too_few_sources_are_refused",
    ),
    "Adapters.routed": Note(
        text=(
            "A context and not an argument of forward, because the model between is not ours: "
            "it passes nothing on to its Linears."
        ),
        test="test_gradient_checkpointing_changes_nothing",
    ),
    "Adapters.disabled": Note(
        test="test_disabled_is_the_base_bit_for_bit",
    ),
    "Adapters.folded": Note(
        text="One routing is one LoRA, so it can be part of the weights.",
        equation="W = W_0 + α / R sum_s c_s B_s A_s",
        test="test_folded_equals_routed_for_any_number_of_rows",
    ),
    "Adapters.merge": Note(
        test="test_merge_folds_for_good",
    ),
    "Adapters.detach": Note(
        test="test_detach_restores_the_module",
    ),
    "Adapters.unfoldable": Note(
        test="test_a_routing_that_no_single_weight_has_is_refused",
    ),
    "Adapters.keep": Note(
        test="test_keep_drops_the_other_samples_in_each_linear",
    ),
    "Adapters.routing": Note(),
    "Adapters.parameter_groups": Note(
        text=("The router reads standardised features and needs a rate some hundred times lower."),
        grade="chosen",
    ),
    "Adapters.state_dict": Note(
        test="test_adapter_state_alone_restores_the_function",
    ),
    "Adapters.load_state_dict": Note(
        test="test_a_state_that_does_not_fit_changes_nothing",
    ),
    "Adapters._exclusive": Note(
        test="test_of_two_threads_the_second_is_refused",
    ),
    "Adapters._base_classes": Note(),
    "Adapters._folded_weights": Note(
        test="test_a_fold_of_a_bfloat16_base_is_rounded_once",
    ),
    "Adapters._remove_skills": Note(
        text="merge and detach end with it.",
    ),
    "Adapters._warn_unvisited": Note(
        test="test_linears_that_are_never_called_are_reported_once",
    ),
    "Adapters._apply": Note(),
    "Adapters.__getstate__": Note(
        text=(
            "Inside disabled and folded the Linears have other classes, so a copy would have "
            "lost its skills."
        ),
    ),
    "OrchMoE": Note(
        text="The paper's Task-Skill Allocation module, together with the router.",
        grade="secondary",
        source=("a learnable task-skill allocation matrix; one for each Linear is inferred"),
    ),
    "OrchMoE.__init__": Note(
        text=("Z starts wide, so that the abstract tasks begin with different skills."),
        equation="Z ~ N(0, 3)",
        grade="chosen",
        test="test_Z_starts_with_the_given_standard_deviation",
    ),
    "OrchMoE.allocation_weights": Note(
        text=("Each row of Zhat sums to 1: an abstract task shares itself out over the skills."),
        equation="Z^hat_ks = sigmoid(Z_ks) / sum_j sigmoid(Z_kj)",
        grade="inferred",
        source="as in Poly (Ponti et al. 2023)",
        test="test_relaxed_bernoulli_noise_enters_as_stated",
    ),
    "OrchMoE.route": Note(
        text=(
            "All Linears at once. w does not depend on the Linear, Zhat does not depend on "
            "the sample."
        ),
        equation="c_ns = sum_k w_k Z^hat_nks",
        grade="inferred",
        source="from Eq. 3 as summarised, with skills that all abstract tasks share",
        test="test_one_hot_w_is_poly_with_mixed_outputs",
    ),
    "OrchMoE._noise": Note(
        grade="inferred",
        source="as in Poly; off by default",
        test="test_noise_acts_in_training_only",
    ),
    "OrchMoE._drop_routing": Note(
        grade="chosen",
        test="test_dropped_samples_have_exactly_the_mean_routing",
    ),
    "embedding_width": Note(
        text="It decides D of the router.",
        test="test_the_width_can_be_given",
    ),
    "attach": Note(
        text="The one function that most users call.",
        test="test_zero_B_is_the_base_bit_for_bit_and_only_B_gets_a_gradient",
    ),
    "target_linears": Note(
        test="test_a_linear_in_two_places_is_adapted_once",
    ),
    "_require_skills_possible": Note(
        text="These Linears would be adapted in vain: their owner never calls them.",
        test="test_attach_refuses_what_it_cannot_adapt",
    ),
}
