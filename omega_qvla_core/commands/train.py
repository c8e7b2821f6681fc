"""``omega-qvla train``: behaviour cloning of a small policy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from omega_qvla_core.commands.console import console, progress_bar, user_errors

app = typer.Typer(no_args_is_help=True, help="Train small policies from scratch.")

LOG_FILE = "train_log.jsonl"


@app.callback()
def _group() -> None:
    """Train small policies from scratch."""


@app.command()
def tabletop(
    demos: Annotated[Path, typer.Option(help="Folder of demonstrations (`omega-qvla tabletop demos`).")],
    out: Annotated[Path, typer.Option(help="Folder of the run: state, log and the exported policy.")],
    validation: Annotated[Path | None, typer.Option(help="Folder of held-out demonstrations.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    steps: Annotated[int, typer.Option(min=1)] = 6000,
    batch: Annotated[int, typer.Option(min=1)] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    settings: Annotated[str, typer.Option(help="Further settings as JSON, e.g. '{\"grounding_weight\": 0}'.")] = "{}",
    stop_after_s: Annotated[
        float | None, typer.Option(help="Save and stop after this time; run again to go on.")
    ] = None,
) -> None:
    """Train the tabletop policy. Interrupted runs go on where they were when the command is given again."""
    from omega_qvla_core.train.config import TrainConfig, tabletop_model_config
    from omega_qvla_core.train.dataset import Demonstrations
    from omega_qvla_core.train.export import export_policy
    from omega_qvla_core.train.trainer import Progress, Trainer

    with user_errors():
        config = TrainConfig(**{"steps": steps, "batch": batch, "seed": seed, **_settings(settings)})
        data = Demonstrations(demos, device)
        held_out = Demonstrations(validation, device, data.stats) if validation else None
        console.print(f"{data.episodes} episodes, {len(data)} frames")
        model_config = tabletop_model_config(
            len(data.tokenizer.vocabulary), data.max_tokens, data.state.shape[1], data.targets.shape[1]
        )
        trainer = Trainer(data, model_config, config, out, held_out)
        parameters = sum(p.numel() for p in trainer.model.policy.parameters())
        console.print(f"{parameters} parameters, training state in {trainer.state_path}")
        with progress_bar("training") as bar, (out / LOG_FILE).open("a", encoding="utf-8") as log:

            def report(progress: Progress) -> None:
                record = dataclasses.asdict(progress)
                if progress.step % (10 * config.log_every) == 0:
                    record["validation"] = trainer.validate()
                log.write(json.dumps(record) + "\n")
                log.flush()
                note = " ".join(f"{name} {value:.3f}" for name, value in progress.losses.items())
                bar.update(progress.step, progress.steps, f"{progress.observations_per_s:.0f} obs/s {note}")

            complete = trainer.run(report, stop_after_s)
        export_policy(data, trainer.averaged_model().policy, out / "policy", "tabletop")
        console.print(f"validation: {trainer.validate()}")
    console.print(f"policy: {out / 'policy'}" if complete else "stopped early; give the same command to go on")


def _settings(text: str) -> dict[str, object]:
    from omega_qvla_core.errors import ConfigError
    from omega_qvla_core.train.config import TrainConfig

    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--settings {text!r} is not JSON ({error})") from error
    unknown = [name for name in settings if name not in TrainConfig.field_names()]
    if unknown:
        raise ConfigError(f"--settings: unknown {unknown[0]!r}; valid: {', '.join(TrainConfig.field_names())}")
    return settings
