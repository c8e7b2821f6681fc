"""Whole processors of public checkpoints: against recorded vectors and ids, and what they refuse."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from omega_qvla_core.errors import CheckpointError, ConfigError, InstructionError, ObservationError
from omega_qvla_core.policy_types import Observation
from omega_qvla_core.processing.gr00t_processor import Gr00tProcessor, Gr00tSizes
from omega_qvla_core.processing.normalizers import Normalizer, read_stats
from omega_qvla_core.processing.pi05_processor import Pi05Processor
from omega_qvla_core.processing.prompt.text_tokenizer import TextTokenizer
from omega_qvla_core.processing.robot_setup import ROBOT_SETUPS, CameraBinding, RobotSetup, robot_setup
from omega_qvla_core.processing.robots import aloha_actions_to_robot, aloha_state_to_model
from omega_qvla_core.processing.vector_normalizer import VectorNormalizer

DATA = Path(__file__).parents[1] / "data" / "golden"
GR00T = json.loads((DATA / "gr00t" / "preprocess" / "preprocess.json").read_text())
TENSORS = load_file(DATA / "gr00t" / "preprocess" / "preprocess.safetensors")
PI05 = json.loads((DATA / "pi05" / "preprocess.json").read_text())
RELEASED = Gr00tSizes(image_size=224, tokens_per_image=256, image_token_id=151669, max_state_dim=64, num_embodiments=32)
KEYS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
# Cuts the recorded prompts into the pieces that Qwen's byte pairs leave whole.
WORDS = Regex(r"""'s| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n|\s+""")
UNKNOWN = 1
SPECIAL = GR00T["prompt"]["ids"]


def runs(ids: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for one in ids:
        if found and found[-1][0] == one:
            found[-1][1] += 1
        else:
            found.append([one, 1])
    return found


def qwen_tokenizer() -> TextTokenizer:
    """A tokenizer that knows the words of the recorded prompts by their real ids."""
    splitter = pre_tokenizers.Split(WORDS, "isolated")
    vocabulary: dict[str, int] = {"<unk>": UNKNOWN}
    markers = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
    for case in GR00T["prompt"]["cases"]:
        for text, coded in zip(case["expanded_text"], case["input_ids_run_length"]):
            text = text.replace("{256 x <IMG_CONTEXT>}", "<IMG_CONTEXT>")
            pieces = [
                word
                for part in markers.split(text)
                for word in ([part] if part in SPECIAL else [word for word, _ in splitter.pre_tokenize_str(part)])
            ]
            ids = [one for one, count in coded if one != SPECIAL["<|endoftext|>"] for _ in range(min(count, 9))]
            ids = [one for index, one in enumerate(ids) if one != 151669 or ids[index - 1] != 151669]
            if len(pieces) == len(ids):
                vocabulary.update(zip(pieces, ids))
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, **SPECIAL}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return TextTokenizer(tokenizer, "tokenizer.json")


def libero(name: str = "gr00t_libero") -> Gr00tProcessor:
    setup = robot_setup(name)
    statistics = GR00T["libero"]["synthetic_metadata"]["statistics"]
    vectors = []
    for kind, parts in (("state", setup.state_parts), ("action", setup.action_parts)):
        normalizers = [
            Normalizer(
                f"gr00t_{part.normalization}",
                len(statistics[kind][part.key]["min"]),
                read_stats(statistics[kind][part.key], part.key),
                part.key,
            )
            for part in parts
        ]
        width = sum(one.width for one in normalizers)
        names = tuple(KEYS) if width == 7 else (*KEYS[:-1], "gripper_0", "gripper_1")
        vectors.append(VectorNormalizer(tuple(normalizers), names))
    return Gr00tProcessor(setup, vectors[0], vectors[1], qwen_tokenizer(), RELEASED)


def libero_observation() -> Observation:
    from test_gr00t_golden_preprocess import pattern

    # The recorded images are what the client hands over, turned already.
    images = {
        key.removeprefix("video."): pattern(*case["formula_args"])[::-1, ::-1]
        for key, case in GR00T["libero"]["images"].items()
    }
    raw = GR00T["libero"]["raw_state"]
    state = np.concatenate([np.array(raw[f"state.{key}"])[0] for key in KEYS])
    return Observation(images, state, GR00T["libero"]["instruction"])


def test_the_recorded_libero_observation_comes_out_equal():
    processor = libero()
    inputs = processor.prepare([libero_observation()])
    np.testing.assert_array_equal(processor.padded_state(inputs.measured), TENSORS["libero/state"][0])
    np.testing.assert_array_equal(inputs.images[0][0].numpy(), TENSORS["libero/pixel_values_view0"])
    np.testing.assert_array_equal(
        inputs.images[1][0, :, :32, :32].numpy(), TENSORS["libero/pixel_values_view1_top_left_32"]
    )
    result = GR00T["libero"]["result"]
    assert inputs.embodiment == tuple(result["embodiment_id"])
    wanted = [one for one, count in result["input_ids_run_length"] for _ in range(count)]
    # " ramekin" is three byte pairs to the real tokenizer, and one unknown word here.
    place = next(index for index in range(len(wanted)) if wanted[index : index + 3] == [435, 373, 7989])
    wanted[place : place + 3] = [UNKNOWN]
    found = inputs.tokens[0].tolist()
    assert len(found) == len(wanted)
    assert all(mine in (UNKNOWN, theirs) for mine, theirs in zip(found, wanted))
    assert found.count(UNKNOWN) < 12
    assert inputs.token_mask.all()
    assert inputs.state.shape == (1, 64) and (inputs.state[0, 8:] == 0).all()


@pytest.mark.parametrize("case", GR00T["prompt"]["cases"], ids=lambda case: case["name"][:40])
def test_token_ids_of_recorded_prompts(case):
    if case["name"].startswith("non-ascii"):
        pytest.skip("byte merges are the real tokenizer's; the text is compared in the golden tests")
    base, rows = libero(), []
    for instruction, images in zip(case["instruction"], case["n_images"]):
        bracketed = isinstance(instruction, dict)
        plain = instruction["numpy_array"] if bracketed else instruction
        cameras = tuple(CameraBinding(f"camera{index}", f"camera{index}") for index in range(images))
        setup = replace(base.setup, cameras=cameras, bracketed_prompt=bracketed)
        one = Gr00tProcessor(setup, base.state, base.actions, base.tokenizer, RELEASED)
        rows.append(one.encode_prompt(plain if isinstance(plain, str) else plain[0]))
    if len(rows) > 1 and len(set(map(len, rows))) > 1:
        longest = max(map(len, rows))
        assert [longest - len(row) for row in rows] == case["attention_mask_zeros"]
        rows = [[SPECIAL["<|endoftext|>"]] * (longest - len(row)) + row for row in rows]
    assert [runs(row) for row in rows] == case["input_ids_run_length"]


@pytest.mark.parametrize(("name", "group"), [("gr00t_libero", "libero"), ("gr00t_libero_mean_std", "libero_mean_std")])
def test_recorded_actions_are_unnormalized_exactly(name, group):
    processor = libero(name)
    predicted = TENSORS["libero/normalized_action"]
    found = processor.actions.unnormalize(predicted[..., :7])
    assert found.dtype == np.float32
    for index, key in enumerate(KEYS):
        np.testing.assert_array_equal(found[..., index : index + 1], TENSORS[f"{group}/unnormalized/action.{key}"])
    targets = processor.targets(predicted, np.zeros((1, 8)))
    np.testing.assert_array_equal(targets[..., :6], found[..., :6].astype(np.float64))
    np.testing.assert_array_equal(targets[..., 6], np.sign(1 - 2 * found[..., 6].astype(np.float64)))


def test_batches_are_padded_on_the_left_and_keep_their_rows():
    processor = libero()
    short, long = libero_observation(), replace(libero_observation(), instruction="pick up the red cube")
    batch = processor.prepare([short, long])
    for row, observation in enumerate((short, long)):
        single = processor.prepare([observation])
        length = single.tokens.shape[1]
        assert batch.tokens[row, -length:].tolist() == single.tokens[0].tolist()
        assert batch.token_mask[row].sum() == length
        assert not batch.token_mask[row, : batch.tokens.shape[1] - length].any()


def test_gr00t_refuses_what_it_cannot_read():
    processor = libero()
    observation = libero_observation()
    with pytest.raises(InstructionError, match="is empty"):
        processor.prepare([replace(observation, instruction="  ")])
    with pytest.raises(InstructionError, match="limit is 512"):
        processor.prepare([replace(observation, instruction="the red cube " * 200)])
    with pytest.raises(InstructionError, match="prompt reserves"):
        processor.prepare([replace(observation, instruction="pick <IMG_CONTEXT>")])
    small = {key: np.zeros((100, 100, 3), np.uint8) for key in observation.images}
    with pytest.raises(ObservationError, match=r"camera 'image' gives 100 x 100 pixels.*224 x 224"):
        processor.prepare([replace(observation, images=small)])
    with pytest.raises(ObservationError, match="camera 'wrist_image' is missing"):
        processor.prepare([replace(observation, images={"image": observation.images["image"]})])
    wide = {key: np.zeros((256, 512, 3), np.uint8) for key in observation.images}
    checked = Gr00tProcessor(
        processor.setup, processor.state, processor.actions, processor.tokenizer, RELEASED, {"image": (256, 256)}
    )
    with pytest.raises(ObservationError, match=r"256 x 512 pixels .height x width., the checkpoint was trained on 256"):
        checked.prepare([replace(observation, images=wide)])
    with pytest.raises(ObservationError, match=r"state has shape \(7,\); the policy needs 8"):
        processor.prepare([replace(observation, state=np.zeros(7))])
    with pytest.raises(ObservationError, match="not finite: gripper_1 = nan"):
        processor.prepare([replace(observation, state=np.array([0.0] * 7 + [np.nan]))])
    with pytest.raises(ConfigError, match="image_token_index"):
        Gr00tProcessor(
            processor.setup,
            processor.state,
            processor.actions,
            processor.tokenizer,
            replace(RELEASED, image_token_id=7),
        )


def word_tokenizer() -> TextTokenizer:
    words = ["<pad>", "<bos>", "<unk>", "lift", "the", "cube", "Task:", "State:", "Action:", "cube,", "lift,", "\n"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return TextTokenizer(tokenizer, "tokenizer.json")


def vector(scheme: str, names: tuple[str, ...]) -> VectorNormalizer:
    stats = {"mean": [0.0], "std": [1.0], "q01": [-1.0], "q99": [1.0]}
    arrays = read_stats({key: value * len(names) for key, value in stats.items()}, "stats")
    return VectorNormalizer((Normalizer(scheme, len(names), arrays, "stats"),), names)


def pi05(setup: RobotSetup, **options) -> Pi05Processor:
    scheme = "lerobot_quantiles" if setup.framework == "lerobot" else "openpi_quantile"
    state, actions = vector(scheme, setup.state_names), vector(scheme, setup.action_names)
    return Pi05Processor(setup, state, actions, word_tokenizer(), 40, 56, **options)


def frames(setup: RobotSetup, height: int = 60, width: int = 80) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {camera.key: rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for camera in setup.cameras}


def test_openpis_cameras_have_fixed_slots_and_lerobots_come_first():
    base = replace(robot_setup("openpi_droid"), cameras=(CameraBinding("wrist", "right_wrist_0_rgb"),))
    observation = Observation(frames(base), np.zeros(8), "lift the cube")
    inputs = pi05(base).prepare([observation])
    assert [mask.tolist() for mask in inputs.image_masks] == [[False], [False], [True]]
    assert (inputs.images[0] == -1).all() and (inputs.images[2] != -1).any()
    lerobot = replace(base, framework="lerobot", gripper="as_is")
    inputs = pi05(lerobot, slots=("left", "middle", "right_wrist_0_rgb")).prepare([observation])
    assert [mask.tolist() for mask in inputs.image_masks] == [[True], [False], [False]]
    # 60 x 80 in 56 x 56: 42 rows of picture between two bars of black.
    assert (inputs.images[0][0, :, :7] == -1).all() and (inputs.images[0][0, :, -7:] == -1).all()


def test_libero_images_are_turned():
    setup = robot_setup("openpi_libero")
    observation = Observation(frames(setup, 56, 56), np.zeros(8), "lift the cube")
    turned = pi05(setup).prepare([observation]).images[0][0].numpy()
    upright = pi05(replace(setup, rotate_images=False)).prepare([observation]).images[0][0].numpy()
    np.testing.assert_array_equal(turned, upright[:, ::-1, ::-1])


def test_the_prompt_holds_the_state_or_not():
    setup = robot_setup("openpi_libero")
    observation = Observation(frames(setup), np.zeros(8), "lift the cube")
    bare = pi05(setup).prepare([observation])
    assert bare.tokens[0, : int(bare.token_mask.sum())].tolist() == [1, 3, 4, 5, 11]
    with_state = pi05(replace(setup, state_in_prompt=True)).prepare([observation])
    ids = with_state.tokens[0, : int(with_state.token_mask.sum())].tolist()
    assert ids[:6] == [1, 6, 3, 4, 9, 7] and len(ids) > 13
    assert (with_state.tokens[0, len(ids) :] == 0).all()
    with pytest.raises(InstructionError, match=r"prompt has \d+ tokens, the checkpoint's max_token_len is 40"):
        pi05(setup).prepare([replace(observation, instruction="lift " * 50)])


@pytest.mark.parametrize("name", ["delta_libero_6_-1", "delta_aloha"])
def test_deltas_are_added_to_the_state_as_recorded(name):
    case = PI05["robots"]["examples"][name]
    width = len(case["mask"])
    state_names = tuple(f"entry_{index}" for index in range(len(case["state"])))
    setup = RobotSetup(
        framework="openpi",
        cameras=(CameraBinding("front", "base_0_rgb"),),
        control_hz=20.0,
        state_names=state_names,
        action_names=state_names[:width],
        action_modes=tuple("delta" if delta else "absolute" for delta in case["mask"]),
    )
    processor = pi05(setup)
    predicted = processor.actions.normalize(np.array(case["delta"]))[None]
    found = processor.targets(np.pad(predicted, ((0, 0), (0, 0), (0, 3))), np.array([case["state"]]))[0]
    np.testing.assert_allclose(found, case["actions"], rtol=0, atol=1e-14)


def test_aloha_goes_through_the_models_space_and_back():
    setup = robot_setup("openpi_aloha")
    processor = pi05(setup)
    case = PI05["robots"]["examples"]["aloha_adapt_to_pi"]
    state = np.array([case["state_in"]])
    np.testing.assert_allclose(processor.model_state(state)[0], case["state_out"], rtol=1e-14)
    predicted = np.zeros((1, 2, 32))
    found = processor.targets(predicted, state)[0, 0]
    middle = np.where([mode == "delta" for mode in setup.action_modes], aloha_state_to_model(state[0]), 0.0)
    np.testing.assert_allclose(found, aloha_actions_to_robot(middle), rtol=0, atol=1e-6)


def test_droids_client_clips_and_closes():
    processor = pi05(robot_setup("openpi_droid"))
    predicted = np.zeros((1, 1, 32))
    predicted[..., :9] = [3.0, -3.0, 0.5, 0, 0, 0, np.nan, 0.6, 9.0]
    found = processor.targets(predicted, np.zeros((1, 8)))[0, 0]
    np.testing.assert_allclose(found[:3], [1, -1, 0.5], atol=1e-5)
    assert np.isnan(found[6]) and found[7] == 1.0


def test_every_known_setup_is_valid_and_reads_back():
    for name, setup in ROBOT_SETUPS.items():
        assert RobotSetup.from_json(setup.to_json()) == setup, name
    assert [part.normalization for part in robot_setup("gr00t_libero_mean_std").action_parts] == [
        *["mean_std"] * 6,
        "min_max",
    ]
    assert robot_setup("openpi_libero").action_modes[0] == "relative"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": ()}, "robot.cameras is empty"),
        ({"control_hz": 0.0}, "robot.control_hz is 0.0"),
        ({"action_modes": ("absolute",)}, "1 entries for 8 action_names"),
        ({"gripper_names": ("hand",)}, "'hand' is not one of the action_names"),
        ({"state_names": ("a", "a")}, "robot.state_names lists 'a' twice"),
        ({"aloha_space": True}, "needs 14 state_names"),
        ({"crop_scale": 1.5}, "robot.crop_scale"),
        ({"num_steps": 0}, "robot.num_steps is 0"),
        ({"state_names": ()}, "must list the entries of both vectors"),
        ({"framework": "gr00t"}, "must list GR00T's modality keys"),
    ],
)
def test_setups_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(robot_setup("openpi_droid"), **changes)


def test_byte_pair_files_give_a_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert TextTokenizer.load(tmp_path, "gr00t_n15").encode("ab") == [2]


def test_a_sentencepiece_model_is_named_in_the_error(tmp_path):
    (tmp_path / "paligemma_tokenizer.model").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"paligemma_tokenizer.model is a SentencePiece model.*fetch tokenizer.json"
    ):
        TextTokenizer.load(tmp_path, "pi05")
