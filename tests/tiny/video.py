"""Stand-ins for the families' video processors, which need torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import interpolate
from transformers.video_utils import VideoMetadata


class PatchVideos:
    """Cuts frames into patches as Qwen's video processors do, two frames a temporal patch.

    Only shapes are right: the patches are not in Qwen's order within a frame, which a random-weight
    model cannot tell. Frames are arrays (T, H, W, 3) of 0-255 with sides that are multiples of
    `patch_size * merge_size`; they are taken at one frame a second.
    """

    temporal_patch_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, patch_size: int, merge_size: int) -> None:
        self.patch_size, self.merge_size = patch_size, merge_size

    def __call__(self, videos: list[Any], **kwargs: Any) -> dict[str, Any]:
        videos = _flat(videos)
        patches, grids = [], []
        for video in videos:
            frames = torch.as_tensor(video).float().permute(0, 3, 1, 2) / 127.5 - 1  # [T, 3, H, W]
            t, h, w = frames.shape[0] // 2, *(side // self.patch_size for side in frames.shape[2:])
            cut = frames.view(t, 2, 3, h, self.patch_size, w, self.patch_size)
            patches.append(cut.permute(0, 3, 5, 2, 1, 4, 6).reshape(t * h * w, -1))
            grids.append([t, h, w])
        return {
            "pixel_values_videos": torch.cat(patches),
            "video_grid_thw": torch.tensor(grids),
            "video_metadata": [_metadata(len(video)) for video in videos],
        }


class FrameVideos:
    """Scales frames to squares, as the video processors of the other families do.

    Frames are arrays (T, H, W, 3) of 0-255, the same T for all; they are taken at one frame a second.
    """

    def __init__(self, key: str, size: int) -> None:
        self.key, self.size = key, size
        self.num_frames, self.fps = 4, 1  # SmolVLM's chat template asks for them
        self.model_input_names = (key,)

    def __call__(self, videos: list[Any], **kwargs: Any) -> dict[str, Any]:
        videos = _flat(videos)
        scaled = [
            interpolate(torch.as_tensor(video).float().permute(0, 3, 1, 2) / 127.5 - 1, self.size)
            for video in videos
        ]
        return {self.key: torch.stack(scaled), "video_metadata": [_metadata(len(v)) for v in videos]}


def _flat(videos: list[Any]) -> list[Any]:
    """The clips of all rows; processors pass on what they were given, clips or one list a row."""
    return [clip for row in videos for clip in (row if isinstance(row, list) else [row])]


def _metadata(frames: int) -> VideoMetadata:
    return VideoMetadata(total_num_frames=frames, fps=1.0, frames_indices=list(range(frames)))
