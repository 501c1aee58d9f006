"""stub"""
from dataclasses import replace
import torch
from model import Transformer
def random_student(was, seed, dim, n_layers, n_heads, n_kv_heads=None, ffn_dim=None, tie_embeddings=True):
    config = replace(was, dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, ffn_dim=ffn_dim, head_dim=None, tie_embeddings=tie_embeddings)
    m = Transformer(config); m.init_weights(torch.Generator().manual_seed(seed)); return m.eval()
def layers_student(*a): raise NotImplementedError
width_student = layers_student
def check_smaller(a, b): return None
