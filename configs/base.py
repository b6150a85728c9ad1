"""Every knob of a run, with its meaning. Recipes begin with `get_config()` from here and change a few.

The type and the valid range of each knob stand in `rustgpt_jax/config/schema.py`, its default only here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration that all recipes start from: a small modern model on the bundled facts."""
    config = ConfigDict()

    # Initial parameters, data order and dropout all follow from this one number.
    config.seed = 0

    config.tokenizer = ConfigDict()
    # word: words and punctuation; char: characters; byte: UTF-8 bytes; bpe: byte pairs learned from the corpus.
    config.tokenizer.name = "bpe"
    # The most tokens to learn, special ones included. None: as many as the corpus has (word and char only).
    config.tokenizer.vocab_size = 1024

    config.data = ConfigDict()
    # facts, chat: bundled with the package; python_stdlib: the running Python's own source; files: any text.
    config.data.corpus = "facts"
    # `files` only: paths or globs of .txt (or other plain text), .json (a list of strings), .jsonl or .ndjson (one text
    # or list of messages per line), and .csv or .tsv (the column `text`). On the command line, pass one path per flag
    # or a Python list.
    config.data.paths = ()
    # Read no more than this many documents. None: all.
    config.data.max_documents = None
    # document: each document goes to training or validation by its hash, so added files move no other.
    # tail: the end of the whole text is validation (for one long document).
    config.data.split = "document"
    # The share of the corpus kept for validation.
    config.data.valid_fraction = 0.1
    # all: learn every token; assistant: in dialogues, only the assistant's words.
    config.data.loss_mask = "all"
    # Tokens in a training window. None: model.context_length.
    config.data.seq_len = None

    config.model = ConfigDict()
    # Rows of the embedding table. None: the tokenizer's vocabulary.
    config.model.vocab_size = None
    # The most tokens that the model attends to, and the size of a learned position table.
    config.model.context_length = 128
    # Blocks, one after another.
    config.model.n_layers = 4
    # Width of the residual stream.
    config.model.d_model = 128
    # Query heads of attention.
    config.model.n_heads = 4
    # Key/value heads, each shared by n_heads / n_kv_heads query heads (arXiv 2305.13245). None: n_heads.
    config.model.n_kv_heads = None
    # Channels of a head. None: d_model / n_heads.
    config.model.head_dim = None
    # Hidden width of the feed-forward. None: 4 d_model, or where it is gated 8/3 d_model (up to a multiple of 8).
    config.model.d_ff = None
    # Three patterns, each repeated over the layers. A name is one of a table, or the import path of a part of your own,
    # such as my_lab.mixers:Retention. Token mixers: attention, local_attention, latent_attention; rg_lru and deltanet,
    # which are recurrent and need no positions.
    config.model.mixers = ("attention",)
    # gelu (tanh approximation), gelu_exact, relu, relu_squared; gated: swiglu, geglu, geglu_exact, reglu,
    # relu_squared_glu; or a mixture of experts: moe.
    config.model.feedforwards = ("swiglu",)
    # learned: a table added to the embeddings; rope: rotated queries and keys (arXiv 2104.09864); local_rope: the same
    # with local_rope_theta; alibi: scores fall with distance (arXiv 2108.12409); none.
    config.model.positions = ("rope",)
    # layernorm, rmsnorm, or zero_centered_rmsnorm, which multiplies by 1 + scale.
    config.model.norm = "rmsnorm"
    # pre: norms before each sublayer and at the end (arXiv 2002.04745); post: after each sum (arXiv 1706.03762).
    # output: on what each sublayer adds, and at the end (arXiv 2501.00656); sandwich: pre and output (2105.13290).
    config.model.norm_placement = "pre"
    # Added to the variance or mean square that a norm divides by.
    config.model.norm_eps = 1e-6
    # Bias vectors in linear layers and layer norms.
    config.model.bias = False
    # Whether the query, key and value projections have biases. None: same as `bias`.
    config.model.qkv_bias = None
    # Whether the output projection of attention has a bias. None: same as `bias`.
    config.model.attention_output_bias = None
    # Whether the linear layers of feed-forwards have biases (moe has none). None: same as `bias`.
    config.model.feedforward_bias = None
    # Whether layer norms have biases. None: same as `bias`.
    config.model.norm_bias = None
    # Use the embedding table, transposed, as the output layer (arXiv 1608.05859).
    config.model.tie_embeddings = True
    # Multiply embeddings by embedding_scale (arXiv 1706.03762).
    config.model.scale_embeddings = False
    # The embedding multiplier. None: sqrt(d_model).
    config.model.embedding_scale = None
    # Keep logits between plus and minus this, by tanh (arXiv 2408.00118). 0: not in the program.
    config.model.final_logit_softcap = 0.0

    # Normalise queries and keys, by the model's norm: head, in each head (arXiv 2010.04245); projection, all heads of
    # a token at once; none.
    config.model.qk_norm = "none"
    # What scores are multiplied by. None: head_dim^-1/2, or (head_dim + qk_rope_head_dim)^-1/2 in latent_attention.
    config.model.attention_scale = None
    # Also divide attention scores by the layer number, counted from 1 (GPT-2's scale_attn_by_inverse_layer_idx). Used
    # by attention and local_attention.
    config.model.attention_scale_by_layer = False
    # Keep scores between plus and minus this, by tanh. 0: not in the program.
    config.model.attn_logit_softcap = 0.0
    # A learned logit in each head that takes part of the attention and gives nothing (arXiv 2309.17453).
    config.model.attention_sinks = False
    # What computes attention; all give the same but for rounding, and tokens from a cache are always served by plain.
    # auto: cudnn for bfloat16 on NVIDIA GPUs, tokamax on TPUs, triangular on CPUs from 128 to 2047 tokens, else as
    # portable; portable: blockwise from 2048 tokens on, else plain; plain: all scores in memory; triangular: of each
    # quarter of the row those with the tokens before its end; blockwise: those of 512 tokens at a time; cudnn, tokamax:
    # flash attention (arXiv 2307.08691) of these libraries.
    config.model.attention_kernel = "auto"
    # Tokens that local_attention sees, itself included.
    config.model.local_window = 64
    # latent_attention (arXiv 2405.04434): width of the latent that keys and values are made from. None: 4 head_dim.
    config.model.kv_lora_rank = None
    # Width of the latent that queries are made from. None: queries are made from the input itself.
    config.model.q_lora_rank = None
    # Width of the key that all heads share and that has the position. None: half of head_dim, up to an even number.
    config.model.qk_rope_head_dim = None
    # rg_lru and deltanet: tokens that their short convolution sees.
    config.model.conv_width = 4
    # rg_lru: channels of the state. None: d_model.
    config.model.recurrent_width = None
    # rg_lru: number of channel blocks in the gates; each gate reads only its own block, as in Griffin. None: gates read
    # all channels.
    config.model.recurrent_blocks = None
    # rg_lru: multiply the input of a document's first token by sqrt(1 - a^2), like every other token (arXiv
    # 2402.19427). False: do not scale it (RecurrentGemma).
    config.model.scale_first_token = True

    # The slowest wavelength of RoPE is about 2 pi times this.
    config.model.rope_theta = 10000.0
    # The same for the positions local_rope, which have no scaling.
    config.model.local_rope_theta = 10000.0
    # The share of a head's channels that RoPE rotates, the first ones.
    config.model.rope_fraction = 1.0
    # Extends RoPE to longer contexts: none, linear (arXiv 2306.15595), llama3 (arXiv 2407.21783), yarn (2309.00071),
    # longrope (2402.13753).
    config.model.rope_scaling = "none"
    # How many times longer.
    config.model.rope_factor = 1.0
    # llama3, yarn and longrope: the context length before scaling.
    config.model.rope_original_context = None
    # llama3 and yarn: channels with fewer turns in that context are slowed by the whole factor (low_freq_factor of
    # llama3, beta_slow of yarn).
    config.model.rope_beta_slow = 1.0
    # Channels with more turns in it are not slowed (high_freq_factor of llama3, beta_fast of yarn).
    config.model.rope_beta_fast = 4.0
    # Multiplier for queries and keys. None: the default of the scaling method, which is 0.1 ln(rope_factor) + 1 for
    # yarn, sqrt(1 + ln(rope_factor) / ln(rope_original_context)) for longrope, and 1 otherwise.
    config.model.rope_attention_factor = None
    # yarn: round the bounds of the interpolated channel range to integers.
    config.model.rope_truncate = True
    # longrope: divisors of the frequency of each pair of channels, for contexts up to rope_original_context.
    config.model.rope_short_factors = ()
    # longrope: the same divisors for a context_length above rope_original_context.
    config.model.rope_long_factors = ()

    # moe: experts in a layer.
    config.model.n_experts = 8
    # Experts that each token goes to.
    config.model.experts_per_token = 2
    # Hidden width of an expert. None: that of swiglu.
    config.model.d_expert = None
    # Activation of the gated experts: silu, gelu (tanh approximation), gelu_exact, relu or relu_squared.
    config.model.expert_activation = "silu"
    # Places that an expert has, as a multiple of the tokens of a row that it gets on average; a token that finds none
    # is not fed, so it depends on those before it, and decoding, with places for all, is not what training was.
    # 0: a place for every token (dropless).
    config.model.capacity_factor = 0.0
    # Divide the routing weights of a token by their sum, so that they add up to 1 (Mixtral). False: use the softmax
    # over all experts (Switch). With one expert per token this must be False, since a constant weight of 1 does not
    # train the router.
    config.model.norm_topk_prob = True
    # Coefficient of the load-balancing loss (arXiv 2101.03961): n_experts * sum over experts of (share of tokens routed
    # to the expert * its mean probability), as in transformers; it equals experts_per_token for balanced routing. The
    # losses of all layers are summed (transformers pools the tokens of all layers instead). 0 removes the loss from the
    # program.
    config.model.load_balance_loss_weight = 0.01
    # Weight in the loss of the squared log of the router's softmax normaliser (arXiv 2202.08906). 0: not there.
    config.model.router_z_loss = 0.0

    # Knobs of parts of your own as pairs of a name and a number: (("decay", 0.9),). They are structure.
    config.model.extra = ()
    # Probability of dropping an activation in training. 0: no dropout in the program at all.
    config.model.dropout = 0.0
    # Standard deviation of initial weights; projections into the residual stream are divided by sqrt(2 n_layers).
    config.model.init_std = 0.02
    # Precision of activations and matrix products: float32 or bfloat16. Parameters, norms and losses are float32. To
    # launch.py, auto is what suits its device, and what the run's config says then: bfloat16 on GPUs and TPUs; on CPUs
    # float32, with matmul_dtype and logits_dtype bfloat16 where the processor multiplies so.
    config.model.dtype = "float32"
    # The same for what mixers compute, and keep in their caches; the residual stream stays in dtype. None: dtype.
    config.model.mixer_dtype = None
    # The same for what feed-forwards compute. None: dtype.
    config.model.feedforward_dtype = None
    # The same for the product that gives the logits, which are float32 themselves. None: dtype.
    config.model.logits_dtype = None
    # Type that the operands of linear layers in blocks are rounded to, in the backward pass too; sums and results keep
    # the dtype of the layer. float8 has a scale for each tensor (arXiv 2209.05433) and is fast from the H100 on; its
    # scales are computed from all tokens of a call, so a token depends slightly on later tokens and on other rows.
    # None: dtype.
    config.model.matmul_dtype = None
    # Materialize what the gradients of linear layers and activations are computed from (the slope of an activation, a
    # transposed operand) instead of letting the compiler recompute it. Results differ by rounding only. None: True on
    # CPUs, where it is faster, else False.
    config.model.save_residuals = None
    # True: compile one block and run it in a loop; False: compile every layer, slower to start, faster if small.
    config.model.scan_layers = True
    # What the backward pass recomputes to save memory, from the least to the most: none; dots, all but matrix
    # products; dots_no_batch, all but products with weights, so attention too; full, each block. offload is
    # dots_no_batch with what it keeps moved to the memory of the host.
    config.model.remat = "none"

    config.optimizer = ConfigDict()
    # adamw, adam (decay as an L2 gradient), sgd, lion, muon or schedule_free (AdamW evaluated at its average; meant
    # for the schedule constant).
    config.optimizer.name = "adamw"
    # The highest learning rate; the schedule multiplies it by a factor from 0 to 1.
    config.optimizer.learning_rate = 1e-3
    # Decay rate of the first moment of adam, adamw and lion, and of what muon leaves to adamw; for schedule_free, which
    # keeps none, the share of the average in the point that gradients are taken at: above 0.
    config.optimizer.b1 = 0.9
    # Decay rate of their second moment; for lion, of the momentum that is kept.
    config.optimizer.b2 = 0.99
    # Added to the root of the second moment that adam, adamw and schedule_free divide by.
    config.optimizer.eps = 1e-8
    # Momentum of sgd and muon.
    config.optimizer.momentum = 0.95
    # muon only: the learning rate of the matrices inside the blocks; all else learns at learning_rate.
    config.optimizer.muon_learning_rate = 0.02
    # Decoupled weight decay, multiplied by the learning rate and by the factor of the parameter's group.
    config.optimizer.weight_decay = 0.1
    # (regular expression, factor): the first expression found in a parameter's path decides. All must be matched.
    config.optimizer.weight_decay_groups = ((r"norm|bias|decay|sinks", 0.0), (r".*", 1.0))
    # Scale gradients so that their global norm is at most this. 0: no clipping in the program at all.
    config.optimizer.clip_norm = 1.0
    # Keep what the optimizer keeps in the memory of the host, and bring it to the device for each update: slower, for
    # models that would not fit.
    config.optimizer.offload_state = False
    # Type in which momentum and first moments are kept, and z of schedule_free: float32 or bfloat16. Second moments are
    # float32 always: they change by 1 - b2 of themselves a step, which bfloat16 would round away. So it does with steps
    # of z below 1/256 of a parameter: for schedule_free, keep float32 where learning rates are small.
    config.optimizer.state_dtype = "float32"

    config.schedule = ConfigDict()
    # constant, linear, cosine or wsd (warm up, stay, decay); each after a linear warm-up.
    config.schedule.name = "cosine"
    # Steps in which the rate rises linearly from 0.
    config.schedule.warmup_steps = 20
    # wsd only: the share of the steps, at the end, in which the rate falls linearly.
    config.schedule.decay_frac = 0.2
    # The factor that linear, cosine and wsd have come down to when the steps are over.
    config.schedule.final_lr_frac = 0.1

    config.training = ConfigDict()
    # Optimizer steps.
    config.training.steps = 200
    # Passes over the training text, such as 3 or 0.5, instead of a number of steps; the run records its steps.
    # None: training.steps decides.
    config.training.epochs = None
    # Windows in a step, over all devices and accumulation parts.
    config.training.batch_size = 16
    # Parts that a batch is run in, one after another, to save memory; the gradient is that of the whole batch, but for
    # the load balance of moe, which each part has for itself.
    config.training.grad_accum_steps = 1
    # Optimizer steps in one call of the compiled program. The results do not depend on it.
    config.training.steps_per_jit_call = 10
    # Weight of the squared log of the softmax normaliser in the loss (arXiv 2204.02311). 0: not in the program.
    config.training.z_loss = 0.0
    # Tokens of each window whose logits exist at a time; the backward pass computes them again. None: all at once.
    config.training.loss_chunk_size = None

    # A mesh of devices: how many each kind of parallelism has. -1, for one of them: all that are left. A run may go on
    # with another mesh: the mesh says where it is computed, not what.
    config.mesh = ConfigDict()
    # Each has a share of the batch, and the whole state.
    config.mesh.data = -1
    # Each has a share of the batch, and of the parameters, which are gathered layer by layer (arXiv 1910.02054).
    config.mesh.fsdp = 1
    # Each has a share of the batch, and some of the experts of each layer (arXiv 2006.16668).
    config.mesh.expert = 1
    # Each has a stretch of every window of text.
    config.mesh.context = 1
    # Each has a share of the heads, of the hidden channels and of the vocabulary (arXiv 1909.08053).
    config.mesh.tensor = 1

    config.faults = ConfigDict()
    # A step whose loss, gradient or update is not finite changes no parameter. Then: stop; skip, which goes on with
    # the next batch; or rewind: back to the last regular checkpoint, and on with the batches after the bad one.
    config.faults.nonfinite_policy = "stop"
    # How many such steps skip and rewind forgive a run; one more stops it.
    config.faults.max_skipped = 10

    config.logging = ConfigDict()
    # Steps between lines of training metrics.
    config.logging.log_every = 10
    # Steps between evaluations, which also write samples.
    config.logging.eval_every = 100
    # Batches of the validation split in an evaluation. None: all of it.
    config.logging.eval_batches = None
    # Steps between checkpoints.
    config.logging.checkpoint_every = 100
    # Prompts that each evaluation continues as samples; for dialogue data, questions to answer. On the command line,
    # pass one text per flag or a Python list.
    config.logging.sample_prompts = ()

    config.sampling = ConfigDict()
    # Generated text is a function of the parameters, the prompt, the knobs below and this number.
    config.sampling.seed = 0
    # The most tokens to generate.
    config.sampling.max_tokens = 128
    # 0: always the likeliest token (greedy); 1: the model's own distribution.
    config.sampling.temperature = 0.8
    # Keep only the k likeliest tokens. 0: all.
    config.sampling.top_k = 0
    # Keep the likeliest tokens whose probabilities reach this sum (arXiv 1904.09751). 1: all.
    config.sampling.top_p = 0.95
    # Keep the tokens at least this fraction as likely as the likeliest (arXiv 2407.01082). 0: all.
    config.sampling.min_p = 0.0
    # Divide the logits of tokens seen so far by this (arXiv 1909.05858). 1: no penalty.
    config.sampling.repetition_penalty = 1.0
    # Behavior when a text fills the model's context: end it (stop), or continue from the last half of the context
    # (slide).
    config.sampling.past_context = "stop"
    # Earlier exchanges that a question in a chat comes with. None: as many as the context holds.
    config.sampling.history_turns = None
    # Type in which the weights of linear layers are read, token by token: bfloat16, or int8 with a scale for each
    # output. It is narrower for speed, and changes what is drawn. None: that in which the model multiplies.
    config.sampling.weight_dtype = None
    # What multiplies the few rows of a token on a CPU; all give the same but for rounding. plain: XLA; native: code in
    # C++, faster, which is compiled on its first use, and replaced by plain where there is no compiler.
    config.sampling.matmul_impl = "plain"

    # Stages run one after another on the same parameters and optimizer state, each with the knobs in which it differs:
    # ({"name": "pretrain", "data": {...}}, {"name": "instruct", ...}). Empty: one stage with the knobs above.
    config.stages = ()
    return config
