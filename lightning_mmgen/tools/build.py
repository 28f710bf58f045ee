"""``mmgen build``: the builders of records, called with a command line's arguments."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, TypeVar

import torch

from ..build.journal import Shard

Settings = TypeVar("Settings")


def build(args: argparse.Namespace) -> str:
    """Run the builder that ``args.action`` names.

    Returns:
        Its report.

    Raises:
        ValueError: an argument out of its range, or what the builder raises.
    """
    if args.action == "edits":
        from ..build.edits import Edits, build_edits

        return build_edits(_settings(Edits, args), args.out, Shard.parse(args.shard))
    if args.action == "questions":
        from ..build.questions import Questions, build_questions

        return build_questions(_settings(Questions, args), args.out, Shard.parse(args.shard))
    if args.action == "subjects":
        from ..build.subjects import Subjects, build_subjects

        return build_subjects(_settings(Subjects, args), args.out, Shard.parse(args.shard))
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.action == "crops":
        from ..build import crops

        return crops.build(crops.Options(**{key: value for key, value in vars(args).items() if key not in ("command", "action")}))
    if getattr(args, "batch_size", 1) < 1 or getattr(args, "workers", 0) < 0:
        raise ValueError("--batch-size must be 1 or more, --workers 0 or more")
    run: dict[str, Any] = {"device": args.device, "shard": Shard.parse(args.shard)}
    if hasattr(args, "workers"):
        run["workers"] = args.workers
    if args.action == "synthetic":
        from ..build.synthetic import Synthetic, build_synthetic

        return build_synthetic(_settings(Synthetic, args), args.out, **run)
    if args.action == "styled":
        from ..build.styled import Styled, build_styled

        return build_styled(_settings(Styled, args), args.out, **run)
    if args.action == "photos":
        from ..build.photos import Photos, build_photos

        return build_photos(_settings(Photos, args), args.out, **run)
    if args.action == "attention":
        from ..build.attention import Targets, build_attention

        return build_attention(_settings(Targets, args), args.out, **run)
    if args.action == "clusters":
        from ..build import clusters

        args.domains = clusters.read_lines(args.domains) if args.domains else clusters.DOMAINS
        embedding, clustering = _settings(clusters.Embedding, args), _settings(clusters.Clustering, args)
        return clusters.build_clusters(embedding, clustering, args.out, engine=args.engine, **run)
    from ..build.masks import Masks, build_masks

    return build_masks(_settings(Masks, args), args.out, **run)


def _settings(kind: type[Settings], args: argparse.Namespace) -> Settings:
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})  # type: ignore[arg-type]
