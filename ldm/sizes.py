"""What Stable Diffusion XL is told about a picture besides its text: a handful of numbers.

In training they were true of the picture: its size before it was scaled, where it was cropped, and the size
that it was trained at (Podell et al. 2023, sections 2.2 and 2.3); for the refiner an aesthetic score in place
of the last. When sampling they are wishes: a large original size asks for detail, a crop at (0, 0) for a
subject that is not cut off.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Heights before widths, in pixels. None is the size of the picture that is made.

    original: the size that the picture is claimed to have had before it was scaled.
    crop:     (top, left), where it was cropped after that.
    target:   the size after cropping; the refiner does not read it, but instead
    aesthetic_score, negative_aesthetic_score: about 1 … 10, for the prompt and for the negative one.
    """
    original: tuple[int, int] | None = None
    crop: tuple[int, int]            = (0, 0)
    target: tuple[int, int] | None   = None
    aesthetic_score: float           = 6.0
    negative_aesthetic_score: float  = 2.5

    def numbers(self, height: int, width: int, count: int, *, negative: bool = False) -> tuple[float, ...]:
        """The numbers for a picture of height × width: 6 as the base reads them, 5 as the refiner does.

        ValueError: any other count.
        """
        score = self.negative_aesthetic_score if negative else self.aesthetic_score
        last  = {6: self.target or (height, width), 5: (score,)}.get(count)
        if last is None:
            raise ValueError(f"This U-Net wants {count} numbers besides the pooled text; known are 6, as the "
                             f"base of Stable Diffusion XL (original size, crop, target size), and 5, as its "
                             f"refiner (original size, crop, aesthetic score).")
        return (*(self.original or (height, width)), *self.crop, *last)
