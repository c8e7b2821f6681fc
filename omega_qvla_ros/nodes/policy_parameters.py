"""The parameters of ``policy_node``; see ``parameters`` for what a row means.

Zero or a negative number stands for the contract's number where the description says so: a robot's own numbers are in
its contract, a launch file changes single ones.
"""

from __future__ import annotations

from omega_qvla_ros.nodes.parameters import ParameterSpec, When

POLICY_NODE = (
    ParameterSpec(
        "checkpoint",
        "tabletop_w4a4",
        "Checkpoint or pack folder, or the name of a shipped policy.",
        when=When.CONFIGURE,
    ),
    ParameterSpec(
        "contract", "tabletop", "Robot contract: a YAML file or a shipped robot's name.", when=When.CONFIGURE
    ),
    ParameterSpec("device", "cpu", "Where the policy computes: cpu or cuda.", when=When.CONFIGURE),
    ParameterSpec(
        "num_steps",
        0,
        "Denoise steps; 0 is the checkpoint's own number, any other that it was not made for is refused.",
        when=When.CONFIGURE,
        minimum=0,
        maximum=100,
    ),
    ParameterSpec(
        "inference_threads",
        0,
        "CPU threads of one inference; 0 leaves it to torch.",
        "1 is best for small policies beside a simulator on two cores",
        when=When.CONFIGURE,
        minimum=0,
        maximum=256,
    ),
    ParameterSpec(
        "recipe",
        "",
        "Name of the quantization recipe that the checkpoint must have been made with; empty takes any.",
        when=When.CONFIGURE,
    ),
    ParameterSpec(
        "require_quantization",
        False,
        "Refuse a policy that is not quantized, or holds no quantized layer.",
        when=When.CONFIGURE,
    ),
    ParameterSpec(
        "stamp_source",
        "header",
        "How old a sample is: by its header's stamp, or by its receipt where a clock cannot be synchronized.",
        when=When.CONFIGURE,
        choices=("header", "receive"),
    ),
    ParameterSpec(
        "dry_run",
        False,
        "Everything runs and nothing is sent: the motion goes to ~/dry_run/joint_trajectory.",
        when=When.CONFIGURE,
    ),
    ParameterSpec(
        "second_goal",
        "reject",
        "What ~/start does while the arm runs: refuse, or begin anew.",
        when=When.LIVE,
        choices=("reject", "preempt"),
    ),
    ParameterSpec(
        "control_rate_hz",
        0.0,
        "Rate at which the trajectory window is sent, in Hz, not below the contract's; 0 is the contract's rate.",
        when=When.LIVE,
        minimum=0.0,
        maximum=1000.0,
    ),
    ParameterSpec(
        "instruction",
        "",
        "What the arm is told, in words; empty at start means the contract's default. Also topic ~/instruction.",
        when=When.LIVE,
    ),
    ParameterSpec(
        "execution_horizon",
        0,
        "Steps of a chunk after which the next inference starts; 0 is the contract's number.",
        "4 steps gave 100 of 100, 8 steps 97, 16 steps 90 in the synchronous prototype",
        when=When.LIVE,
        minimum=0,
        maximum=1000,
    ),
    ParameterSpec(
        "chunk_rate_hz",
        0.0,
        "Inferences per second at most, as another way to say execution_horizon, rounded to steps; 0 leaves it there.",
        when=When.LIVE,
        minimum=0.0,
        maximum=1000.0,
    ),
    ParameterSpec(
        "blend_time_s",
        -1.0,
        "Time over which a new chunk replaces the committed motion, in s; negative is the contract's number.",
        when=When.LIVE,
        minimum=-1.0,
        maximum=5.0,
    ),
    ParameterSpec(
        "noise_seed",
        0,
        "Seed of the start noise: another noise for every inference, the same ones again after each ~/start.",
        when=When.LIVE,
        minimum=0,
        maximum=2**31 - 1,
    ),
    ParameterSpec(
        "inference_timeout_s",
        0.0,
        "An inference that has not returned after this wall time holds the arm, in s; 0 is the contract's number.",
        when=When.LIVE,
        minimum=0.0,
        maximum=600.0,
    ),
    ParameterSpec(
        "retry_delay_s",
        -1.0,
        "Hold after a failed inference or a refused chunk before the next attempt, in s; negative is the contract's.",
        when=When.LIVE,
        minimum=-1.0,
        maximum=60.0,
    ),
    ParameterSpec(
        "max_consecutive_errors",
        0,
        "Failed inferences or refused chunks in a row that latch the arm; 0 is the contract's number.",
        when=When.LIVE,
        minimum=0,
        maximum=100,
    ),
    ParameterSpec(
        "startup_warn_s",
        0.0,
        "After this time without usable data the state says what to check, in s; 0 is the contract's number.",
        when=When.LIVE,
        minimum=0.0,
        maximum=600.0,
    ),
    ParameterSpec(
        "start_timeout_s",
        0.0,
        "A start that gets no complete data for this time is given up, in s; 0 is the contract's number.",
        when=When.LIVE,
        minimum=0.0,
        maximum=600.0,
    ),
    ParameterSpec(
        "image_timeout_s",
        0.0,
        "An older image holds the arm, in s; 0 is the contract's number, and a larger one than that has no effect.",
        when=When.LIVE,
        minimum=0.0,
        maximum=60.0,
    ),
    ParameterSpec(
        "joint_states_timeout_s",
        0.0,
        "An older joint position holds the arm, in s; 0 is the contract's number, a larger one has no effect.",
        when=When.LIVE,
        minimum=0.0,
        maximum=60.0,
    ),
    ParameterSpec(
        "trace_file",
        "",
        "File for a trace of every chunk; empty writes none. One that exists gets a number behind its name.",
        when=When.CONFIGURE,
    ),
    ParameterSpec(
        "debug_image",
        False,
        "Draw ~/debug/image while somebody subscribes to it.",
        when=When.LIVE,
    ),
    ParameterSpec(
        "debug_trajectory",
        False,
        "Draw the way of the tip link as ~/debug/trajectory, from robot_description and the plan.",
        when=When.CONFIGURE,
    ),
    ParameterSpec(
        "tip_link",
        "",
        "Link whose way is drawn; empty is the last link of the contract's joints.",
        when=When.CONFIGURE,
    ),
    ParameterSpec(
        "start_on_activate",
        True,
        "Move as soon as the node is active; false waits for ~/start.",
        when=When.CONFIGURE,
    ),
    ParameterSpec(
        "auto_activate",
        False,
        "Configure and activate at start-up, where no lifecycle manager does it.",
    ),
)
