//! Compiles proto/ without a system protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = "../../proto";
    println!("cargo:rerun-if-changed={folder}");
    let files = protox::compile(["deviceplugin_v1beta1.proto", "podresources_v1.proto"], [folder])?;
    tonic_prost_build::configure().btree_map(".").compile_fds(files)?;
    Ok(())
}
