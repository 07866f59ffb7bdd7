"""edgecomp.compress"""
