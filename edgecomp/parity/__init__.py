"""edgecomp.parity"""
