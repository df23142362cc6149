"""Stand-ins for the families' video processors, which need torchvision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
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


class PicturedVideos:
    """Frames as the family's own image processor cuts pictures, one after another; all clips are as long.

    Attributes:
        images: the image processor.
        names: of its outputs -> as its outputs for videos are called.
        timed: whether prompts say when each frame was taken.
        options: for the image processor.
    """

    slice_mode, downsample_mode = False, "16x"  # MiniCPM-V's processor asks for them

    def __init__(self, images: Any, names: dict[str, str], timed: bool, **options: Any) -> None:
        self.images, self.names, self.timed, self.options = images, names, timed, options
        self.model_input_names = list(names.values())

    def __call__(self, videos: list[Any], **kwargs: Any) -> dict[str, Any]:
        videos = _flat(videos)
        frames = [Image.fromarray(frame) for video in videos for frame in video]
        found = self.images(frames, return_tensors="pt", **self.options)
        made = {new: found[old] for old, new in self.names.items()}
        made = {new: np.array(value) if isinstance(value, list) else value for new, value in made.items()}
        made["num_frames_per_video"] = np.array([len(video) for video in videos])
        metadata = [_metadata(len(video)) for video in videos]
        return made | ({"video_metadata": metadata} if self.timed else {})


def _flat(videos: list[Any]) -> list[Any]:
    """The clips of all rows; processors pass on what they were given, clips or one list a row."""
    return [clip for row in videos for clip in (row if isinstance(row, list) else [row])]


def _metadata(frames: int) -> VideoMetadata:
    return VideoMetadata(total_num_frames=frames, fps=1.0, frames_indices=list(range(frames)))
