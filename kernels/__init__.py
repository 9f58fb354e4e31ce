"""The operators that r2d3's time goes into. Each file stands alone (torch; triton for a GPU).

rasterize            Gaussians -> pictures, depth and normals of all objects and views; differentiable
gradient_matching    the residual nabla-DB loss of Nabla-R2D3 (arXiv 2506.15684)
"""
from kernels.matching import gradient_matching
from kernels.splat import Render, rasterize

__all__ = ["Render", "gradient_matching", "rasterize"]
