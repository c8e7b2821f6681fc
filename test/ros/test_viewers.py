"""The files for RViz and Foxglove: they parse, and every topic and service in them is one of the robot or the node."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from omega_qvla_ros.bags.topics import recorded_topics
from omega_qvla_ros.contract import load_contract
from omega_qvla_ros.resources import config_file, resolve_contract

NODES = Path(__file__).resolve().parent.parent.parent / "omega_qvla_ros" / "nodes"


def known_names() -> set[str]:
    """Full names in the root namespace: of the tabletop contract, and the policy node's own."""
    source = "".join(path.read_text(encoding="utf-8") for path in NODES.glob("*.py"))
    own = {"/policy_node/" + name for name in re.findall(r'"~/([a-z_/]+)"', source)}
    services = {"/policy_node/" + name for name in ("start", "stop", "restart", "reset_fault")}
    contract = load_contract(resolve_contract("tabletop"))
    return own | services | {"/" + topic.name.lstrip("/") for topic in recorded_topics(contract)}


def test_rviz_file_names_topics_that_exist() -> None:
    data = yaml.safe_load(config_file("rviz/omega_qvla.rviz").read_text(encoding="utf-8"))
    displays = data["Visualization Manager"]["Displays"]
    topics = {d[key]["Value"] for d in displays for key in ("Topic", "Description Topic") if key in d}
    assert len(topics) >= 5 and topics <= known_names(), topics - known_names()
    kinds = {display["Class"] for display in displays}
    assert {"rviz_default_plugins/RobotModel", "rviz_default_plugins/Image"} <= kinds


def leaves(layout: Any) -> list[str]:
    return [layout] if isinstance(layout, str) else leaves(layout["first"]) + leaves(layout["second"])


def test_foxglove_layout_places_every_panel_once_and_names_topics_that_exist() -> None:
    data = json.loads(config_file("foxglove/omega_qvla.json").read_text(encoding="utf-8"))
    assert sorted(leaves(data["layout"])) == sorted(data["configById"])
    named: set[str] = set()
    for panel in data["configById"].values():
        named |= {panel[key] for key in ("topicPath", "topicName", "topicToRender", "serviceName") if key in panel}
        named |= set(panel.get("topics", {}))
        named |= {panel["imageMode"]["imageTopic"]} if panel.get("imageMode") else set()
        named |= {path["value"].split(".")[0] for path in panel.get("paths", [])}
    assert len(named) >= 8 and named <= known_names(), named - known_names()
    joints = load_contract(resolve_contract("tabletop")).joint_names
    for panel in data["configById"].values():
        for number, path in enumerate(panel.get("paths", [])):
            assert path["label"] == joints[number] and path["value"].endswith(f"[{number}]")
