"""Notes on the blocks of orchmoe.py for the annotated page, docs/annotated.html.

The page shows the docstring of a block from orchmoe.py itself. Here is the rest: the equation, who
says so, and the test that pins it. Grades are those of docs/paper.md: stated (the paper's
abstract), secondary (summaries of the paper), inferred (from the papers it builds on), chosen
(ours). Blocks without a grade are engineering, or follow from blocks that have one.

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
            "The eight equations at the right are this implementation; the abstract contains "
            "none of them. The source is the prompt, never the answer. x is the input of one "
            "Linear and y its output, W0 is its frozen weight, A_s and B_s are a skill, and scale "
            "is alpha / R. The code stores B_s transposed and multiplies from the right: x A^T B. "
            "An abstract task is an index without a name; it starts as a cluster of prompts. The "
            "only loss is that of the language model: there is no balancing loss."
        ),
    ),
    "imports": Note(
        text="There is nothing else to install.",
    ),
    "OrchMoEConfig": Note(
        text=(
            "We chose K, S, R, the adapted Linears and all other defaults: no source that we "
            "could read gives them. A target is the last part of a Linear's name, such as "
            "q_proj in transformers' Llama."
        ),
        grade="chosen",
    ),
    "OrchMoEConfig.__post_init__": Note(
        text="Impossible values are refused here, not after hours of training.",
        test="test_a_config_with_an_impossible_value_is_refused",
    ),
    "Routing": Note(
        text=("With a token router each Linear computes its own w and c, so both are None here."),
    ),
    "TaskRouter": Note(
        text=("Our version of what the abstract calls the Automatic Task Classification module."),
        grade="inferred",
        source=(
            "one router for the whole model, which reads the source; a router in each Linear, "
            'which reads its tokens, is the other reading: router="token"'
        ),
    ),
    "TaskRouter.__init__": Note(
        text="The router trains K (D + 1) parameters, W_task and b, and no others.",
        test="test_the_initial_bias_gives_uniform_w_for_zero_x_hat",
    ),
    "TaskRouter.summarise": Note(
        text=(
            "Nothing is learned here. After rmsnorm the product of a token with itself is D, "
            "far above its products with other tokens. So a token attends almost only to "
            "itself and its repetitions, and X_hat is nearly 2 X. Standardising removes the "
            "factor 2: the attention changes almost nothing. In a decoder the mask must cover "
            "the prompt alone, or the router would see the answer."
        ),
        equation="X^hat = softmax(X X^T / sqrt(D)) X + X ;; x^hat = mean_L X^hat",
        grade="secondary",
        source=(
            "the attention without parameters; the rmsnorm and the mean over tokens are chosen"
        ),
        test="test_w_is_the_formula_in_numpy",
    ),
    "TaskRouter.forward": Note(
        text="Without `fit`, mu = 0 and sd = 1, and w is nearly uniform.",
        equation="w = softmax(W_task ((x^hat - μ) / sd) + b)",
        grade="secondary",
        source=("w = W_task x_hat + b; the softmax is inferred, the standardising is chosen"),
        test="test_w_is_the_formula_in_numpy",
    ),
    "TaskRouter.fit": Note(
        text=(
            "x_hat is standardised here. C are the centres and H is the mean entropy over the "
            "sources. If W_task started with small normal values, w would at first hardly depend "
            "on the sample."
        ),
        equation="H(softmax(scale C x^hat)) = ln(K) / 3",
        grade="chosen",
        test="test_the_kmeans_start_tells_clusters_apart_without_labels",
    ),
    "TaskRouter._check_shapes": Note(
        text="Token ids instead of embeddings are the most common mistake.",
        test="test_a_source_of_another_shape_is_refused_with_the_given_shape",
    ),
    "masked_mean": Note(
        text="m_l is 1 at real tokens and 0 at padding.",
        equation="x^hat = sum_l m_l X^hat_l / sum_l m_l",
        grade="chosen",
        test="test_junk_in_the_padding_changes_nothing",
    ),
    "spherical_kmeans": Note(
        text=(
            "Here i runs over the sources that are nearest to centre k. This finds the "
            "abstract tasks with which training starts."
        ),
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
            "kernels.mix_skills computes the same faster; tests compare the outputs and all "
            "gradients of both."
        ),
        equation="y = W_0 x + (α / R) sum_s c_s B_s A_s x",
        grade="secondary",
        source=("the paper's Eq. 3, as summaries give it: outputs are mixed, not factors"),
        test="test_mix_skills_equals_its_slow_twin",
    ),
    "SkillLinear": Note(
        text=("Because the object stays, saved references, hooks and names stay valid."),
        test="test_attach_keeps_the_module_the_weight_and_the_class",
    ),
    "SkillLinear.skill_parameters": Note(),
    "SkillLinear.forward": Note(
        text="Where the base is a plain Linear, one function computes both parts.",
        equation="y = W_0 x + (α / R) sum_s c_s B_s A_s x",
        grade="secondary",
        source="skills are LoRA modules, outputs are mixed; the scale rule is chosen",
        test="test_linear_is_the_equation_written_out",
    ),
    "SkillLinear.skill_c": Note(
        text=(
            "The sample router has computed c already, in `route`. Only with a token router "
            "is c computed here: w of each token, times Zhat."
        ),
        equation="c = w Z^hat",
        grade="inferred",
        test="test_token_router_with_identity_allocation_is_moe_lora",
    ),
    "SkillLinear._base_trains": Note(
        text=(
            "If W0 trains, because you unfroze it after attach, it needs a gradient, which "
            "kernels.mix_skills does not compute."
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
    "new_skills": Note(
        text=(
            "alpha is the same for all methods. So a plain LoRA of rank S R has the scale "
            "alpha / (S R), which is 1/S times the scale of a skill: with c = 1/S the skills "
            "are exactly this LoRA. B = 0, so before training the adapted model computes what "
            "the base computes."
        ),
        equation="A ~ U(-1 / sqrt(D), 1 / sqrt(D)) ;; B = 0",
        grade="inferred",
        source="A and B start as in LoRA (Hu et al. 2021); the scale rule is chosen",
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
    "Adapters.routed": Note(
        text=(
            "It is a context and not an argument of forward, because the model's own code "
            "would not pass such an argument on to its Linears."
        ),
        test="test_gradient_checkpointing_changes_nothing",
    ),
    "Adapters.disabled": Note(
        test="test_disabled_is_the_base_bit_for_bit",
    ),
    "Adapters.folded": Note(
        text="One routing is one LoRA, so it can be part of the weights.",
        equation="W = W_0 + (α / R) sum_s c_s B_s A_s",
        test="test_folded_equals_routed_for_any_number_of_rows",
    ),
    "Adapters.merge": Note(
        test="test_merge_folds_for_good",
    ),
    "Adapters.detach": Note(
        test="test_detach_restores_the_module",
    ),
    "Adapters.unfoldable": Note(
        text=(
            "The reasons are noise in training, a token router, and a Linear that computes "
            "more than a product with a plain weight."
        ),
        test="test_a_routing_that_no_single_weight_has_is_refused",
    ),
    "Adapters.keep": Note(
        test="test_keep_drops_the_other_samples_in_each_linear",
    ),
    "Adapters.routing": Note(),
    "Adapters.parameter_groups": Note(
        text=(
            "The router reads standardised features, and its default rate is 50 times lower than "
            "that of the skills. At the first step B = 0, so only B gets a gradient; once B is "
            "not 0, the loss reaches w and Z through c. adapters.parameters() lacks the skills, "
            "because they belong to the model: use these groups."
        ),
        grade="chosen",
    ),
    "Adapters.state_dict": Note(
        test="test_the_adapter_state_restores_the_function",
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
        text="This is the last step of merge and of detach.",
    ),
    "Adapters._warn_unvisited": Note(
        test="test_linears_that_are_never_called_are_reported_once",
    ),
    "Adapters._apply": Note(),
    "Adapters.__getstate__": Note(
        text=(
            "Inside disabled and folded the Linears have their base classes, so a copy would "
            "lose its skills."
        ),
    ),
    "OrchMoE": Note(
        text=(
            "Our version of what the abstract calls the Task-Skill Allocation module. This "
            "class also holds the router."
        ),
        grade="secondary",
        source=(
            "a learnable task-skill allocation matrix; that each Linear has its own is inferred"
        ),
    ),
    "OrchMoE.__init__": Note(
        text=(
            "Z starts with a large spread, so that the abstract tasks begin with different skills."
        ),
        equation="Z ~ N(0, 3^2)",
        grade="chosen",
        test="test_Z_starts_with_the_given_standard_deviation",
    ),
    "OrchMoE.allocation_weights": Note(
        text=("Each row of Zhat sums to 1: an abstract task divides its weight among the skills."),
        equation="Z^hat_ks = sigmoid(Z_ks) / sum_j sigmoid(Z_kj)",
        grade="inferred",
        source="as in Poly (Ponti et al. 2023)",
        test="test_relaxed_bernoulli_noise_enters_as_stated",
    ),
    "OrchMoE.route": Note(
        text=(
            "All Linears at once. w does not depend on the Linear. Zhat does not depend on "
            "the sample, except with noise."
        ),
        equation="c_ns = sum_k w_k Z^hat_nks",
        grade="inferred",
        source=(
            "from the paper's Eq. 3, as summaries give it; that all abstract tasks share one "
            "set of skills is our reading"
        ),
        test="test_one_hot_w_is_poly_with_mixed_outputs",
    ),
    "OrchMoE.fit_router": Note(
        text="One pass over a few hundred training sources is enough.",
        grade="chosen",
        test="test_too_few_sources_are_refused",
    ),
    "embedding_width": Note(
        text="This is the D of the router, unless `width` is given.",
        test="test_the_width_can_be_given",
    ),
    "attach": Note(
        text="The one function that most users call.",
        test="test_zero_B_is_the_base_bit_for_bit_and_only_B_gets_a_gradient",
    ),
    "target_linears": Note(
        test="test_a_linear_in_two_places_is_adapted_once",
    ),
}
