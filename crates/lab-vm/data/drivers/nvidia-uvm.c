// SPDX-License-Identifier: GPL-2.0
/* Stands in for NVIDIA's second module: it uses the first, which cannot be unloaded before it. */

#include <linux/module.h>

void nvidia_stand_in(void);

static int __init nvidia_uvm_init(void)
{
	nvidia_stand_in();
	return 0;
}
module_init(nvidia_uvm_init);

static void __exit nvidia_uvm_exit(void)
{
}
module_exit(nvidia_uvm_exit);

MODULE_DESCRIPTION("Stand-in for NVIDIA's module for unified memory");
MODULE_LICENSE("GPL");
