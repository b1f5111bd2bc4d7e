"""What every process has: its life from start to drain, gRPC and HTTP ports, health, status. No torch."""
